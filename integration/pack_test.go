package integration

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	"golang.org/x/sys/unix"

	"lazuli/convert"
	"lazuli/fs/pack"
	"lazuli/fs/profile"
	"lazuli/fs/remote"
)

// packScript reads many small files and the middle of a large one.
const packScript = `for f in /app/f*; do sha256sum < $f; done
/bin/busybox dd if=/app/large bs=1024 skip=1024 count=300 2>/dev/null | sha256sum
echo READY`

// packImage makes a lazy image whose command is packScript, as a layout, and returns what that prints. Images of different builds have other
// content in a fifth of the small files, those of different kinds in all.
func packImage(t testing.TB, kind, build int) (layout, want string) {
	t.Helper()
	content := func(i, n int) []byte {
		b := noise(uint64(i), n)
		copy(b, fmt.Sprintf("%d %d ", kind, i))
		if i%5 == 0 && i < 40 {
			copy(b, fmt.Sprintf("%d %d build %d ", kind, i, build))
		}
		for at := 64 << 10; at < n; at += 64 << 10 { // no chunk is like one of another kind
			copy(b[at:], fmt.Sprintf("%d ", kind))
		}
		return b
	}
	line := func(p []byte) string { return fmt.Sprintf("%x  -\n", sha256.Sum256(p)) }
	large := content(50, 3<<20)
	layer := tarLayer(t, func(add func(tar.Header, []byte)) {
		add(tar.Header{Name: "app/", Typeflag: tar.TypeDir, Mode: 0o755}, nil)
		add(tar.Header{Name: "app/unused", Typeflag: tar.TypeReg, Mode: 0o644}, content(51, 2<<20))
		for i := range 40 {
			data := content(i, 500+i*1500)
			add(tar.Header{Name: fmt.Sprintf("app/f%02d", i), Typeflag: tar.TypeReg, Mode: 0o644}, data)
			want += line(data)
		}
		add(tar.Header{Name: "app/large", Typeflag: tar.TypeReg, Mode: 0o644}, large)
	})
	want += line(large[1<<20:][:300<<10]) + "READY\n"
	return convertLayout(t, runnableLayout(t, []string{"sh", "-c", packScript}, layer), convert.Options{}), want
}

// packRegistries are one with a referrers API and one without.
func packRegistries(t *testing.T, f func(t *testing.T, r *Registry, api bool)) {
	t.Run("referrers API", func(t *testing.T) { f(t, apiRegistry(t, nil), true) })
	t.Run("tag", func(t *testing.T) { f(t, NewRegistry(t, RegistryOptions{Distribution: true}), false) })
}

// apiRegistry starts a registry with a referrers API.
func apiRegistry(t testing.TB, wrap func(http.Handler) http.Handler) *Registry {
	dir := blobDir(t.TempDir())
	return NewRegistry(t, RegistryOptions{Wrap: func(http.Handler) http.Handler {
		h := registry.New(registry.WithReferrersSupport(true), registry.WithBlobHandler(dir), registry.Logger(log.New(io.Discard, "", 0)))
		if wrap != nil {
			h = wrap(h)
		}
		return h
	}})
}

// A cli is the program, with a root folder of its own.
type cli struct {
	t            testing.TB
	program, dir string
	roots        int
}

func newCLI(t testing.TB) *cli {
	t.Helper()
	needRoot(t)
	needProgram(t, "runc")
	c := &cli{t: t, dir: shortDir(t)}
	c.program = filepath.Join(c.dir, "lazuli")
	program, err := buildLazuli("test")
	must(t, err)
	must(t, os.WriteFile(c.program, program, 0o755))
	must(t, os.WriteFile(c.dir+"/config.toml", fmt.Appendf(nil, "socket = %q\nhosts_dir = %q\n", c.dir+"/no.sock", c.dir+"/nohosts"), 0o644))
	t.Cleanup(func() {
		for _, s := range residue(c.dir) {
			t.Errorf("left behind: %s", s)
		}
		killAll(t, c.dir)
		unmountAll(t, c.dir)
	})
	return c
}

// cold forgets all that is here.
func (c *cli) cold() { c.roots++ }

func (c *cli) command(args ...string) *exec.Cmd {
	return exec.Command(c.program, append([]string{"--config", c.dir + "/config.toml", "--root", fmt.Sprintf("%s/root%d", c.dir, c.roots)}, args...)...)
}

// run runs a command line and returns its exit code and what it printed.
func (c *cli) run(args ...string) (code int, stdout, stderr string) {
	c.t.Helper()
	cmd := c.command(args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		c.t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

// ok is run for what has to succeed.
func (c *cli) ok(args ...string) (stdout string) {
	c.t.Helper()
	code, stdout, stderr := c.run(args...)
	if code != 0 {
		c.t.Fatalf("lazuli %q: code %d: %s", args, code, stderr)
	}
	return stdout
}

// requests counts what a start asked for, by kind.
func requests(log []Request, layers []string) map[string]int {
	n := map[string]int{}
	for _, q := range log {
		kind, id := filepath.Base(filepath.Dir(q.Path)), filepath.Base(q.Path)
		switch {
		case q.Method != "GET":
			kind = q.Method
		case id == "lazuli-pack": // it may be given up before it is sent
			continue
		case kind == "manifests" && strings.HasPrefix(id, "sha256-"):
			kind = "tag"
		case kind == "blobs" && slices.Contains(layers, id):
			kind = "layers"
		}
		n[kind]++
	}
	return n
}

// coldStarts starts an image on nodes that hold nothing, until one has asked for nothing but what has to be asked for: a start does not
// wait for its pack, so that on a busy machine a read may come before it. What is said of a start is true of all of them.
func (c *cli) coldStarts(r *Registry, ref, want string, layers []string) {
	c.t.Helper()
	must := map[string]int{"manifests": 1, "referrers": 1, "tag": 1, "blobs": 2 /* config and pack */, "layers": len(layers) /* tables of contents */}
	const tries = 6
	for try := 1; ; try++ {
		c.cold()
		r.Reset()
		if out := c.ok("run", ref); out != want {
			c.t.Fatalf("output:\n%s\nwant:\n%s", out, want)
		}
		got := requests(r.Log(), layers)
		more := got["layers"] - must["layers"]
		got["layers"] -= more
		if fmt.Sprint(got) != fmt.Sprint(must) || more < 0 {
			c.t.Fatalf("requests %v, want %v: %v", got, must, r.Log())
		}
		if more == 0 {
			return
		}
		if try == tries {
			c.t.Fatalf("no start of %d did without further requests, the last had %d: %v", tries, more, r.Log())
		}
	}
}

// TestStartupPack: a job is recorded, its pack pushed, and a node that holds nothing starts it with that and nothing else; so does the next
// build of the image with a pack made of the same profile.
func TestStartupPack(t *testing.T) {
	needRoot(t)
	packRegistries(t, func(t *testing.T, r *Registry, api bool) {
		c := newCLI(t)
		lazy, want := packImage(t, 1, 1)
		ref := r.Push(t, lazy, "app")
		recorded := c.dir + "/app.profile"
		out := c.ok("profile", "--until", "READY", "-o", recorded, "--push", ref)
		if !strings.HasPrefix(out, want+"sha256:") {
			t.Errorf("profile printed:\n%s", out)
		}
		f, err := os.Open(recorded)
		must(t, err)
		p, err := profile.Parse(f)
		f.Close()
		must(t, err)
		var paths []string
		for _, x := range p.Pieces {
			if !slices.Contains(paths, x.Path) {
				paths = append(paths, x.Path)
			}
		}
		if len(paths) != 42 || paths[0] != "bin/busybox" || paths[1] != "app/f00" || paths[41] != "app/large" {
			t.Errorf("recorded %q", paths)
		}
		c.coldStarts(r, ref, want, layerDigests(t, lazy))

		rebuilt, wantRebuilt := packImage(t, 1, 2)
		if wantRebuilt == want {
			t.Fatal("the builds are the same")
		}
		ref = r.Push(t, rebuilt, "rebuilt")
		c.cold()
		c.ok("profile", "pack", "--profile", recorded, "--push", ref)
		c.coldStarts(r, ref, wantRebuilt, layerDigests(t, rebuilt))

		// The build after it finds that pack by its tag, and what has changed since by the paths: eight files, in a few requests
		// and before they are read, if the job is not faster.
		next, wantNext := packImage(t, 1, 3)
		ref = r.Push(t, next, "rebuilt")
		layers := layerDigests(t, next)
		few := false
		for range 6 {
			c.cold()
			r.Reset()
			if out := c.ok("run", ref); out != wantNext {
				t.Fatalf("output:\n%s\nwant:\n%s", out, wantNext)
			}
			more := requests(r.Log(), layers)["layers"] - len(layers)
			if more < 1 {
				t.Fatalf("nothing of the layers was fetched, but they have changed: %v", r.Log())
			}
			if few = more <= 4; few {
				break
			}
		}
		if !few {
			t.Errorf("changed files were fetched one by one: %v", r.Log())
		}
	})
}

// pushPack puts any bytes beside an image as its startup pack.
func pushPack(t testing.TB, ref string, b []byte) {
	t.Helper()
	src, err := remote.Open(t.Context(), parse(t, ref), remote.Options{})
	must(t, err)
	defer src.Close()
	image, err := remote.Pick(t.Context(), src, nil)
	must(t, err)
	_, err = convert.PushPack(t.Context(), parse(t, ref), image, bytes.NewReader(b), int64(len(b)), remote.Options{})
	must(t, err)
}

// TestStartupPackContainerd: containerd pulls, and the daemon fetches the pack once, in one request, and nothing else of the layers but their
// tables of contents, before anything is started and after. Wrong packs change nothing about what the job prints.
func TestStartupPackContainerd(t *testing.T) {
	needRoot(t)
	var half string // of which blob only half is sent
	r := apiRegistry(t, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			if half == "" || q.Method != "GET" || !strings.HasSuffix(q.URL.Path, half) {
				next.ServeHTTP(w, q)
				return
			}
			a := &answer{header: w.Header(), status: http.StatusOK}
			next.ServeHTTP(a, q)
			w.WriteHeader(a.status)
			w.Write(a.body.Bytes()[:a.body.Len()/2])
			panic(http.ErrAbortHandler)
		})
	})
	c := newCLI(t)
	n := startNode(t, daemonOptions{}, containerdOptions{})
	blob := func(b []byte) string { return fmt.Sprintf("sha256:%x", sha256.Sum256(b)) }
	for i, wrong := range []struct {
		name   string
		spoil  func(b []byte) []byte
		broken bool // the stream breaks
		few    bool // the rest is right, and may be all that is needed
	}{
		{name: "good", spoil: func(b []byte) []byte { return b }},
		{name: "truncated", spoil: func(b []byte) []byte { return b[:len(b)/2] }},
		{name: "broken off", spoil: func(b []byte) []byte { return b }, broken: true},
		{name: "flipped", spoil: func(b []byte) []byte {
			b = bytes.Clone(b)
			x, err := pack.ReadIndex(bytes.NewReader(b))
			must(t, err)
			for at := x.Start; at < int64(len(b)); at += 3000 {
				b[at] ^= 1
			}
			return b
		}},
		{name: "junk", spoil: func(b []byte) []byte { return noise(9, 10*len(b)) }},
		{name: "junk with an index", few: true, spoil: func(b []byte) []byte { // one frame at the end says that it is much larger
			b = bytes.Clone(b)
			const size = 30 << 20
			frames := int(binary.LittleEndian.Uint32(b[12:]))
			last := b[24+(frames-1)*12:]
			old := binary.LittleEndian.Uint32(last)
			binary.LittleEndian.PutUint32(last, size)
			binary.LittleEndian.PutUint32(last[4:], size)
			return append(b[:len(b)-int(old)], noise(9, size)...)
		}},
	} {
		t.Run(wrong.name, func(t *testing.T) {
			lazy, want := packImage(t, 10+i, 1)
			layers := layerDigests(t, lazy)
			ref := r.Push(t, lazy, fmt.Sprint("app", i))
			c.cold()
			c.ok("profile", "-o", c.dir+"/p", ref)
			c.ok("profile", "pack", "--profile", c.dir+"/p", "-o", c.dir+"/pack", ref)
			good, err := os.ReadFile(c.dir + "/pack")
			must(t, err)
			bad := wrong.spoil(good)
			pushPack(t, ref, bad)
			half = ""
			if wrong.broken {
				half = blob(bad)
			}
			r.Reset()
			must(t, n.pull(ref))
			ofPack := func() (list []Request) {
				for _, q := range r.Log() {
					if strings.HasSuffix(q.Path, blob(bad)) {
						list = append(list, q)
					}
				}
				return list
			}
			if wrong.name == "good" {
				eventually(t, "the pack does not come", func() bool {
					q := ofPack()
					return len(q) > 0 && q[0].Bytes == int64(len(bad))
				})
			} else {
				eventually(t, "nobody asks for the pack", func() bool { return len(ofPack()) > 0 })
			}
			out, err := n.run(ref, fmt.Sprint("job", i), nil)
			if err != nil || out != want {
				t.Errorf("%v, output:\n%s\nwant:\n%s", err, out, want)
			}
			got, requests := requests(r.Log(), layers), ofPack()
			switch {
			case wrong.name != "good":
				// It is found to be wrong, and the rest asked for as if there were none. Busybox is here, so the pack is asked for behind it.
				if got["layers"] <= len(layers) && !wrong.few || len(requests) > 4 {
					t.Errorf("%v, of the pack %v", got, requests)
				}
			case len(requests) != 1 || requests[0].Range != "" || got["layers"] != len(layers) || got["referrers"] != 1:
				t.Errorf("%v, of the pack %v: %v", got, requests, r.Log())
			}
		})
	}
}

// TestStartupPackRemoved: a pack that never ends holds up neither a start nor the removal of its image, and is given up with that.
func TestStartupPackRemoved(t *testing.T) {
	needRoot(t)
	begun, ended := make(chan struct{}), make(chan struct{})
	var endless string // which blob
	r := apiRegistry(t, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			if endless == "" || q.Method != "GET" || !strings.HasSuffix(q.URL.Path, endless) {
				next.ServeHTTP(w, q)
				return
			}
			a := &answer{header: w.Header(), status: http.StatusOK}
			next.ServeHTTP(a, q)
			w.WriteHeader(a.status)
			half := a.body.Len() / 2
			w.Write(a.body.Next(half))
			close(begun)
			for q.Context().Err() == nil { // a byte a second, or it would count as dead
				w.Write(a.body.Next(1))
				http.NewResponseController(w).Flush()
				select {
				case <-time.After(time.Second):
				case <-q.Context().Done():
				}
			}
			close(ended)
			panic(http.ErrAbortHandler)
		})
	})
	c := newCLI(t)
	n := startNode(t, daemonOptions{}, containerdOptions{})
	lazy, want := packImage(t, 30, 1)
	ref := r.Push(t, lazy, "app")
	c.ok("profile", "-o", c.dir+"/p", ref)
	c.ok("profile", "pack", "--profile", c.dir+"/p", "-o", c.dir+"/pack", ref)
	good, err := os.ReadFile(c.dir + "/pack")
	must(t, err)
	pushPack(t, ref, good)
	endless = fmt.Sprintf("sha256:%x", sha256.Sum256(good))
	must(t, n.pull(ref))
	<-begun
	if out, err := n.run(ref, "job", nil); err != nil || out != want {
		t.Errorf("%v, output:\n%s\nwant:\n%s", err, out, want)
	}
	select {
	case <-ended:
		t.Fatal("the pack was given up while its image is here")
	default:
	}
	n.mustCtr(t, "image", "rm", "--sync", ref)
	eventually(t, "the pack of an image that was removed is still being fetched", func() bool {
		select {
		case <-ended:
			return true
		default:
			return false
		}
	})
}

// TestProfileCommand: what a user may do with it.
func TestProfileCommand(t *testing.T) {
	c := newCLI(t)
	r := NewRegistry(t, RegistryOptions{})
	lazy, _ := packImage(t, 1, 1)
	image := r.Push(t, lazy, "app")
	plain := r.Push(t, runnableLayout(t, []string{"echo", "hi"}), "plain")
	file := func(name string) string { return filepath.Join(c.dir, name) }
	good := file("good")
	c.ok("profile", "-o", good, image, "sh", "-c", "cat /app/f03 >/dev/null")
	must(t, os.WriteFile(file("broken"), []byte("{\"path\":\"a\"}\n{\"path\"\n"), 0o644))
	must(t, os.WriteFile(file("other"), []byte("not/in/the/image\n"), 0o644))

	for _, x := range []struct {
		args []string
		code int
		says string // in stderr
	}{
		{[]string{"profile"}, 2, "usage: lazuli profile"},
		{[]string{"profile", image}, 2, "-o FILE, --push, or both"},
		{[]string{"profile", "--push", "oci:" + lazy}, 2, "is in no registry"},
		{[]string{"profile", "-o", file("x"), "--for", "soon", image}, 2, "--for"},
		{[]string{"profile", "-o", file("x"), "--for", "-1s", image}, 2, "more than 0"},
		{[]string{"profile", "-o", file("x"), "--port", "0", image}, 2, "1 to 65535"},
		{[]string{"profile", "-o", file("x"), "--port", "8123", image, "echo", "hi"}, 1, "nothing listened on port 8123"},
		{[]string{"profile", "-o", file("x"), "UPPER"}, 2, "want NAME[:TAG]"},
		{[]string{"profile", "-o", file("x"), "-v", "/nothing/here:/x", image}, 2, "/nothing/here"},
		{[]string{"profile", "-o", file("x"), "-e", "=x", image}, 2, "want NAME=value"},
		{[]string{"profile", "-o", file("x"), "--merge", file("broken"), image}, 1, "broken: profile: line 2"},
		{[]string{"profile", "-o", file("x"), image, "sh", "-c", "exit 3"}, 1, "ended with code 3"},
		{[]string{"profile", "-o", file("x"), image, "/nothing"}, 1, "/nothing"},
		{[]string{"profile", "-o", file("x"), "--until", "NEVER", image, "echo", "hi"}, 1, `ended and nothing it printed had "NEVER"`},
		{[]string{"profile", "-o", file("nowhere/x"), image, "echo", "hi"}, 1, "nowhere/x: no such file"},
		{[]string{"profile", "-o", file("x"), r.Addr + "/nothing"}, 1, "no such repository"},
		{[]string{"profile", "pack", image}, 2, "want --profile FILE"},
		{[]string{"profile", "pack", "--profile", good, image}, 2, "-o FILE or --push"},
		{[]string{"profile", "pack", "--profile", good, "-o", file("x")}, 2, "usage: lazuli profile pack"},
		{[]string{"profile", "pack", "--profile", good, "--push", "oci:" + lazy}, 2, "is in no registry"},
		{[]string{"profile", "pack", "--profile", file("missing"), "-o", file("x"), image}, 1, "missing: no such file"},
		{[]string{"profile", "pack", "--profile", file("broken"), "-o", file("x"), image}, 1, "broken: profile: line 2"},
		{[]string{"profile", "pack", "--profile", file("other"), "-o", file("x"), image}, 1, "has any of the profile's files"},
		{[]string{"profile", "pack", "--profile", good, "-o", file("x"), plain}, 1, "lazuli convert"},
		{[]string{"profile", "--push", plain}, 1, "lazuli convert"},
	} {
		code, _, stderr := c.run(x.args...)
		if code != x.code || !strings.Contains(stderr, x.says) || strings.Count(stderr, "lazuli: ") != 1 {
			t.Errorf("lazuli %q: code %d, want %d and %q:\n%s", x.args, code, x.code, x.says, stderr)
		}
		if _, err := os.Stat(file("x")); err == nil {
			t.Errorf("lazuli %q left a file", x.args)
			os.Remove(file("x"))
		}
	}

	// What ends it in time, and what need be no registry.
	c.ok("profile", "-o", file("for"), "--for", "400ms", image, "sh", "-c", "cat /app/f05 >/dev/null; sleep 1000")
	c.ok("profile", "-o", file("until"), "--until", "LIST", image, "sh", "-c", "cat /app/f07 >/dev/null; echo here is the LIST; sleep 1000")
	c.ok("profile", "-o", file("port"), "--port", "8123", image, "sh", "-c", "cat /app/f06 >/dev/null; nc -l -p 8123; sleep 1000")
	c.ok("profile", "-o", file("layout"), "oci:"+lazy, "sh", "-c", "cat /app/f09 >/dev/null")
	c.ok("profile", "-o", file("plain"), plain)
	// The same again with an older one: the older share is less, what both have is whole.
	c.ok("profile", "-o", file("merged"), "--merge", file("until"), image, "sh", "-c", "cat /app/f05 >/dev/null")
	for name, want := range map[string]string{
		"for": "app/f05 1", "until": "app/f07 1", "port": "app/f06 1", "layout": "app/f09 1", "plain": "bin/busybox 1", "merged": "app/f05 0.333 app/f07 0.667 bin/busybox 1",
	} {
		b, err := os.Open(file(name))
		must(t, err)
		p, err := profile.Parse(b)
		b.Close()
		must(t, err)
		var got []string
		for _, x := range p.Pieces {
			if s := fmt.Sprintf("%s %.3g", x.Path, x.Share); !slices.Contains(got, s) {
				got = append(got, s)
			}
		}
		fields := strings.Fields(want)
		for i := 0; i < len(fields); i += 2 {
			if s := fields[i] + " " + fields[i+1]; !slices.Contains(got, s) {
				t.Errorf("%s: %q lacks %s", name, got, s)
			}
		}
	}

	// Both at once, and what is written is what is pushed.
	out := c.ok("profile", "pack", "--profile", good, "-o", file("pack"), "--push", image)
	if fi, err := os.Stat(file("pack")); err != nil || fi.Mode().Perm() != 0o644 || !strings.HasPrefix(out, "sha256:") {
		t.Errorf("%v, %v, %q", fi, err, out)
	}

	// Ctrl-C in the middle.
	cmd := c.command("profile", "-o", file("x"), "--push", image, "sh", "-c", "echo begun; sleep 1000")
	stdout, err := cmd.StdoutPipe()
	must(t, err)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	must(t, cmd.Start())
	b := make([]byte, 6)
	_, err = io.ReadFull(stdout, b)
	must(t, err)
	must(t, cmd.Process.Signal(unix.SIGINT))
	io.Copy(io.Discard, stdout)
	cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 128+int(unix.SIGINT) || !strings.Contains(stderr.String(), "stopped by SIGINT") {
		t.Errorf("interrupted: code %d: %s", code, &stderr)
	}
	left, _ := filepath.Glob(fmt.Sprintf("%s/root%d/*/lazuli-*", c.dir, c.roots))
	more, _ := filepath.Glob(fmt.Sprintf("%s/root%d/run/*", c.dir, c.roots))
	packs, _ := filepath.Glob(c.dir + "/lazuli-pack-*")
	if left = slices.Concat(left, more, packs, residue(c.dir)); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	if _, err := os.Stat(file("x")); err == nil {
		t.Error("a profile of a start that was interrupted")
	}
}
