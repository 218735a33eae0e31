package integration

import (
	"archive/tar"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"lazuli/convert"
)

// A gate stands before a registry and lets those pass who have the token that is good now. Tests, not clocks, say when one ends.
type gate struct {
	mu             sync.Mutex
	user, password string // of who gets a token; with no user everybody does
	token          string
	issued         int // tokens
	refused        int // requests that came with a token that was not good any more
}

func (g *gate) wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		g.mu.Lock()
		user, password, _ := q.BasicAuth()
		shown := q.Header.Get("Authorization")
		asks := q.URL.Path == tokenPath
		switch {
		case asks && (g.user == "" || user == g.user && password == g.password):
			if g.token == "" {
				g.token = rand.Text()
			}
			g.issued++
			fmt.Fprintf(w, `{"token":%q,"expires_in":300}`, g.token)
			g.mu.Unlock()
			return
		case !asks && g.token != "" && shown == "Bearer "+g.token:
			g.mu.Unlock()
			next.ServeHTTP(w, q)
			return
		case !asks && shown != "":
			g.refused++
		}
		g.mu.Unlock()
		if !asks {
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s%s",service="test"`, q.Host, tokenPath))
		}
		w.WriteHeader(http.StatusUnauthorized)
		io.WriteString(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`)
	})
}

// end ends the token, and has those who want another give a password, if a user is set.
func (g *gate) end(user, password string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.token, g.user, g.password = "", user, password
}

// counts returns how many tokens were given and how many requests refused since the last call.
func (g *gate) counts() (issued, refused int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	issued, refused = g.issued, g.refused
	g.issued, g.refused = 0, 0
	return issued, refused
}

// pieces makes a lazy image to be run, of busybox and n layers, of which each has one file of noise in data, called 0, 1, …
// It returns what sha256sum says of each.
func pieces(t testing.TB, n int) (layout string, sums []string) {
	t.Helper()
	var layers []v1.Layer
	for i := range n {
		data := noise(uint64(100+i), 300_000)
		layers = append(layers, tarLayer(t, func(add func(tar.Header, []byte)) {
			add(tar.Header{Name: "data/", Typeflag: tar.TypeDir, Mode: 0o755}, nil)
			add(tar.Header{Name: fmt.Sprintf("data/%d", i), Typeflag: tar.TypeReg, Mode: 0o644}, data)
		}))
		sums = append(sums, fmt.Sprintf("%x  /data/%d\n", sha256.Sum256(data), i))
	}
	return convertLayout(t, runnableLayout(t, nil, layers...), convert.Options{}), sums
}

// sleeper has ctr start a container that does nothing.
func (n *node) sleeper(t testing.TB, image, id string) {
	t.Helper()
	_, err := n.run(image, id, []string{"--detach"}, "sleep", "1000000")
	must(t, err)
}

// reads shows that a container reads a piece of its image rightly.
func (n *node) reads(t testing.TB, id string, piece int, want string) {
	t.Helper()
	if out, err := n.exec(id, "sha256sum", fmt.Sprintf("/data/%d", piece)); err != nil || out != want {
		t.Errorf("piece %d: %q, %v, want %q", piece, out, err, want)
	}
}

// readsAgain is reads after what could not be read can be.
func (n *node) readsAgain(t testing.TB, id string, piece int, want string) {
	t.Helper()
	again(t, func() (string, error) { return n.exec(id, "sha256sum", fmt.Sprintf("/data/%d", piece)) }, want)
}

// again has something read that could not be. The first who asks may find that a fetch is under way which pauses between two attempts, for
// longer than a reader of these tests waits.
func again(t testing.TB, read func() (string, error), want string) {
	t.Helper()
	for end := time.Now().Add(patience); ; {
		out, err := read()
		if err == nil && out == want {
			return
		}
		if err == nil || time.Now().After(end) {
			t.Fatalf("%q, %v, want %q", out, err, want)
		}
	}
}

// cannotRead shows that a container gets an I/O error when it reads a piece, and returns what the daemon says about it in its log.
func (n *node) cannotRead(t testing.TB, id string, piece int) (said string) {
	t.Helper()
	before := n.daemon.logged(t)
	out, err := n.exec(id, "sha256sum", fmt.Sprintf("/data/%d", piece))
	if err == nil || !strings.Contains(err.Error(), "Input/output error") && !strings.Contains(err.Error(), "I/O error") {
		t.Errorf("piece %d: %q, %v, want an I/O error", piece, out, err)
	}
	return strings.TrimPrefix(n.daemon.logged(t), before)
}

// logged returns what the daemon has logged.
func (d *Daemon) logged(t testing.TB) string {
	t.Helper()
	b, err := os.ReadFile(d.Dir + "/log")
	must(t, err)
	return string(b)
}

// says shows that a text has all of want.
func says(t testing.TB, text string, want ...string) {
	t.Helper()
	for _, w := range want {
		if !strings.Contains(text, w) {
			t.Errorf("%q is not said in:\n%s", w, text)
		}
	}
}

// A dockerConfig is a folder for DOCKER_CONFIG.
type dockerConfig string

func (dir dockerConfig) login(t testing.TB, host, user, password string) {
	t.Helper()
	auth := base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
	must(t, os.WriteFile(filepath.Join(string(dir), "config.json"), fmt.Appendf(nil, `{"auths": {%q: {"auth": %q}}}`, host, auth), 0o600))
}

// TestTokens: a container that reads on while the registry's tokens end again and again notices nothing, and each costs one refusal
// and one new token.
func TestTokens(t *testing.T) {
	needRoot(t)
	g := &gate{}
	registry := NewRegistry(t, RegistryOptions{Wrap: g.wrap})
	layout, sums := pieces(t, 5)
	image := registry.Push(t, layout, "tokens")
	n := startNode(t, daemonOptions{}, containerdOptions{})
	must(t, n.pull(image))
	n.sleeper(t, image, "a")
	for i, sum := range sums {
		g.end("", "")
		g.counts()
		n.reads(t, "a", i, sum)
		if issued, refused := g.counts(); issued != 1 || refused < 1 {
			t.Errorf("piece %d: %d tokens given and %d requests refused, want 1 and at least 1", i, issued, refused)
		}
	}
	if out, err := n.daemon.get("/v1/status"); err != nil || strings.Contains(n.daemon.logged(t), "read failed") {
		t.Errorf("%s, %v", out, err)
	}
}

// TestLogin: with a wrong password the daemon leaves a pull to containerd, which has the right one; with the right one it is lazy;
// and when the registry's password changes, what is read fails until the daemon's does. Nothing is started again.
func TestLogin(t *testing.T) {
	needRoot(t)
	const user, password = "me", "secret"
	g := &gate{}
	registry := NewRegistry(t, RegistryOptions{Wrap: g.wrap})
	layout, sums := pieces(t, 2)
	layers := layerDigests(t, layout)
	image := registry.Push(t, layout, "login")
	g.end(user, password)
	docker := dockerConfig(t.TempDir())
	docker.login(t, registry.Addr, user, "wrong")
	n := startNode(t, daemonOptions{Env: []string{"DOCKER_CONFIG=" + string(docker)}, More: "read_timeout = \"1s\"\n"}, containerdOptions{})

	if err := n.pull(image, "--user", user+":wrong"); err == nil {
		t.Error("containerd pulled with a wrong password")
	} else {
		says(t, err.Error(), "401")
	}
	registry.Reset()
	must(t, n.pull(image, "--user", user+":"+password))
	if whole := fetchedWhole(registry, layers); len(whole) != len(layers) {
		t.Errorf("with a wrong password of the daemon's containerd fetched %d layers of %d", len(whole), len(layers))
	}
	n.sleeper(t, image, "a")
	n.reads(t, "a", 0, sums[0])
	status, err := n.daemon.lazuli("status")
	must(t, err)
	says(t, status, "NOT LAZY", registry.Addr+" refuses access", "the login is me's", "docker login")
	says(t, n.daemon.logged(t), "left to containerd to unpack", layers[0], "refuses access")
	n.mustCtr(t, "task", "delete", "--force", "a")
	n.mustCtr(t, "container", "delete", "a")
	n.mustCtr(t, "image", "delete", "--sync", image)

	docker.login(t, registry.Addr, user, password)
	registry.Reset()
	must(t, n.pull(image, "--user", user+":"+password))
	n.lazily(t, registry, layers, n.Namespace)
	n.sleeper(t, image, "b")
	n.reads(t, "b", 0, sums[0])
	g.end(user, "changed")
	says(t, n.cannotRead(t, "b", 1), "read failed", layers[2], registry.Addr+" refuses access", "the login is me's")
	docker.login(t, registry.Addr, user, "changed")
	n.readsAgain(t, "b", 1, sums[1])
}

// TestNewPullSecret: what a later CRI pull logs in with is what a container of the earlier one reads with from then on.
func TestNewPullSecret(t *testing.T) {
	needRoot(t)
	const user = "me"
	g := &gate{}
	registry := NewRegistry(t, RegistryOptions{Wrap: g.wrap})
	layout, sums := pieces(t, 2)
	layers := layerDigests(t, layout)
	image := registry.Push(t, layout, "secret")
	pause := NewRegistry(t, RegistryOptions{}).Push(t, pauseImage(t), "pause")
	g.end(user, "first")
	n := startNode(t, daemonOptions{More: "read_timeout = \"1s\"\n", Env: []string{"DOCKER_CONFIG=" + t.TempDir()}},
		containerdOptions{Pause: pause, ThroughDaemon: true})
	_, err := n.crictl("pull", "--creds", user+":first", image)
	must(t, err)
	p := n.pod(t)
	id := p.start(t, image, "sleep", "1000000")
	read := func(piece int) (string, error) {
		return n.crictl("exec", "--sync", id, "sha256sum", fmt.Sprintf("/data/%d", piece))
	}
	if out, err := read(0); err != nil || out+"\n" != sums[0] {
		t.Errorf("%q, %v", out, err)
	}
	g.end(user, "second")
	if out, err := read(1); err == nil {
		t.Errorf("read with an old password: %q", out)
	}
	says(t, n.daemon.logged(t), "read failed", layers[2], "refuses access")
	if _, err := n.crictl("pull", "--creds", user+":wrong", image); err == nil {
		t.Error("pulled with a wrong password")
	}
	if out, err := read(1); err == nil {
		t.Errorf("read with an old password: %q", out)
	}
	_, err = n.crictl("pull", "--creds", user+":second", image)
	must(t, err)
	again(t, func() (string, error) { out, err := read(1); return out + "\n", err }, sums[1])
	p.remove(t)
}

// TestMirrorDown: mirrors that are down, and first in hosts.toml, stop neither pulls nor reads, and the daemon does not ask them for each range. A
// header that the file has for a host is sent to it.
func TestMirrorDown(t *testing.T) {
	needRoot(t)
	var mu sync.Mutex
	var plain []string // requests of the daemon without the header
	registry := NewRegistry(t, RegistryOptions{Wrap: func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			if strings.HasPrefix(q.UserAgent(), "lazuli/") && q.Header.Get("X-Team") != "blue" {
				mu.Lock()
				plain = append(plain, q.URL.Path)
				mu.Unlock()
			}
			next.ServeHTTP(w, q)
		})
	}})
	// One that nobody listens at, and one that hangs up.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	must(t, l.Close())
	attempts := map[string]int{} // by who makes them
	dead := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		mu.Lock()
		if program, _, _ := strings.Cut(q.UserAgent(), "/"); !asksForMore(q) {
			attempts[program]++
		}
		mu.Unlock()
		panic(http.ErrAbortHandler)
	}))
	dead.Config.ErrorLog = log.New(io.Discard, "", 0)
	dead.Start()
	t.Cleanup(dead.Close)
	hosts := t.TempDir()
	must(t, os.Mkdir(filepath.Join(hosts, registry.Addr), 0o755))
	must(t, os.WriteFile(filepath.Join(hosts, registry.Addr, "hosts.toml"), fmt.Appendf(nil, `server = "http://%[1]s"
[host."http://%[2]s"]
[host."%[3]s"]
[host."http://%[1]s"]
[host."http://%[1]s".header]
x-team = "blue"
[header]
x-team = "blue"
`, registry.Addr, l.Addr(), dead.URL), 0o644))
	layout, sums := pieces(t, 3)
	image := registry.Push(t, layout, "mirrored")
	n := startNode(t, daemonOptions{Hosts: hosts}, containerdOptions{Hosts: hosts})
	registry.Reset()
	must(t, n.pull(image))
	n.lazily(t, registry, layerDigests(t, layout), n.Namespace)
	n.sleeper(t, image, "a")
	for i, sum := range sums {
		n.reads(t, "a", i, sum)
	}
	mu.Lock()
	defer mu.Unlock()
	if a := attempts["lazuli"]; a < 1 || a > 2 { // it is asked again after half a minute
		t.Errorf("the mirror was asked by %v, want the daemon to have asked once", attempts)
	}
	if len(plain) > 0 {
		t.Errorf("requests without the header: %q", plain)
	}
}

// asksForMore reports whether a request asks what else there is about an image, such as a startup pack. What is nowhere is looked for at
// all hosts, the dead ones last.
func asksForMore(q *http.Request) bool {
	return Request{Path: q.URL.Path}.looksUp()
}

// A door is an address at which a registry can be had while it is open.
type door struct {
	addr, to string

	mu    sync.Mutex
	l     net.Listener
	conns []net.Conn
	work  sync.WaitGroup
}

func newDoor(t testing.TB, registry *Registry) *door {
	t.Helper()
	d := &door{addr: "127.0.0.1:0", to: registry.Addr}
	d.open(t)
	d.addr = d.l.Addr().String()
	t.Cleanup(d.close)
	return d
}

func (d *door) open(t testing.TB) {
	t.Helper()
	l, err := net.Listen("tcp", d.addr)
	must(t, err)
	d.l = l
	d.work.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", d.to)
			if err != nil {
				in.Close()
				continue
			}
			d.mu.Lock()
			d.conns = append(d.conns, in, out)
			d.mu.Unlock()
			for _, c := range [][2]net.Conn{{in, out}, {out, in}} {
				d.work.Go(func() { io.Copy(c[0], c[1]); c[0].Close(); c[1].Close() })
			}
		}
	})
}

// close ends what goes through the door, and then nobody answers at its address.
func (d *door) close() {
	d.l.Close()
	for done := make(chan struct{}); ; {
		go func() { d.work.Wait(); close(done) }()
		d.mu.Lock()
		for _, c := range d.conns {
			c.Close()
		}
		d.conns = nil
		d.mu.Unlock()
		<-done
		return
	}
}

// TestRegistryAway: a daemon starts, and containers of what is here do, while there is no registry. What is not here is an error with
// a reason until the registry is there again.
func TestRegistryAway(t *testing.T) {
	needRoot(t)
	registry := NewRegistry(t, RegistryOptions{})
	d := newDoor(t, registry)
	registry.Addr = d.addr
	layout, sums := pieces(t, 3)
	layers := layerDigests(t, layout)
	image := registry.Push(t, layout, "away")
	n := startNode(t, daemonOptions{More: "read_timeout = \"1s\"\n"}, containerdOptions{})
	must(t, n.pull(image))
	n.sleeper(t, image, "a")
	n.reads(t, "a", 0, sums[0])
	n.daemon.stop(t)

	d.close()
	n.daemon.start(t)
	n.sleeper(t, image, "b")
	n.reads(t, "b", 0, sums[0])
	said := n.cannotRead(t, "b", 1)
	says(t, said, "read failed", layers[2], "nothing answers at "+d.addr)
	n.cannotRead(t, "a", 1)
	if n := n.daemon.failures(t); n < 2 {
		t.Errorf("status counts %d reads that failed, want 2 at least", n)
	}

	d.open(t)
	n.reads(t, "a", 2, sums[2])
	n.readsAgain(t, "b", 1, sums[1])
	n.reads(t, "a", 1, sums[1])
}

// failures is how many reads failed since the server began, as status counts them.
func (d *Daemon) failures(t testing.TB) int64 {
	t.Helper()
	out, err := d.lazuli("status", "--json")
	must(t, err)
	var s struct{ Fetched struct{ Errors int64 } }
	must(t, json.Unmarshal([]byte(out), &s))
	return s.Fetched.Errors
}
