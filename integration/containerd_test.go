package integration

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"lazuli/convert"
	"lazuli/integration/worst"
)

// tarLayer makes a layer of what write writes.
func tarLayer(t testing.TB, write func(add func(tar.Header, []byte))) v1.Layer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	write(func(h tar.Header, data []byte) {
		h.Size, h.Format = int64(len(data)), tar.FormatPAX
		must(t, w.WriteHeader(&h))
		_, err := w.Write(data)
		must(t, err)
	})
	must(t, w.Close())
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	must(t, err)
	return l
}

// runnableLayout makes an image, as a layout, of busybox and the layers above it. Without a command it runs what it is told to.
func runnableLayout(t testing.TB, command []string, layers ...v1.Layer) string {
	t.Helper()
	needProgram(t, "busybox")
	program, err := exec.LookPath("busybox")
	must(t, err)
	b, err := os.ReadFile(program)
	must(t, err)
	base := tarLayer(t, func(add func(tar.Header, []byte)) {
		for _, d := range []string{"bin", "dev", "etc", "proc", "sys", "tmp"} {
			add(tar.Header{Name: d + "/", Typeflag: tar.TypeDir, Mode: 0o755}, nil)
		}
		add(tar.Header{Name: "bin/busybox", Typeflag: tar.TypeReg, Mode: 0o755}, b)
		for _, applet := range []string{"cat", "echo", "ls", "sh", "sha256sum", "sleep"} {
			add(tar.Header{Name: "bin/" + applet, Typeflag: tar.TypeSymlink, Linkname: "busybox"}, nil)
		}
	})
	return imageLayout(t, command, append([]v1.Layer{base}, layers...)...)
}

// imageLayout makes an image of layers for this platform, as a layout.
func imageLayout(t testing.TB, command []string, layers ...v1.Layer) string {
	t.Helper()
	image, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{OS: "linux", Architecture: "amd64", RootFS: v1.RootFS{Type: "layers"},
		Config: v1.Config{Cmd: command, Env: []string{"PATH=/bin"}}})
	must(t, err)
	image, err = mutate.AppendLayers(image, layers...)
	must(t, err)
	return saveLayout(t, image)
}

func saveLayout(t testing.TB, image v1.Image) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "layout")
	l, err := layout.Write(dir, empty.Index)
	must(t, err)
	must(t, l.AppendImage(image))
	return dir
}

// readLayout returns the only image of a layout, its manifest and its layers.
func readLayout(t testing.TB, dir string) (v1.Image, *v1.Manifest, []v1.Layer) {
	t.Helper()
	index, err := layout.ImageIndexFromPath(dir)
	must(t, err)
	m, err := index.IndexManifest()
	must(t, err)
	image, err := index.Image(m.Manifests[0].Digest)
	must(t, err)
	manifest, err := image.Manifest()
	must(t, err)
	layers, err := image.Layers()
	must(t, err)
	return image, manifest, layers
}

// mixLayouts makes an image of the layers of two that have the same content, one ordinary and one lazy: lazy says from which comes which.
func mixLayouts(t testing.TB, ordinary, converted string, lazy func(i, of int) bool) string {
	t.Helper()
	plain, manifest, layers := readLayout(t, ordinary)
	_, manifestLazy, layersLazy := readLayout(t, converted)
	if len(layers) != len(layersLazy) {
		t.Fatalf("%d and %d layers", len(layers), len(layersLazy))
	}
	config, err := plain.ConfigFile()
	must(t, err)
	config = config.DeepCopy()
	config.RootFS.DiffIDs, config.History = nil, nil
	image, err := mutate.ConfigFile(empty.Image, config)
	must(t, err)
	for i := range layers {
		a := mutate.Addendum{Layer: layers[i], MediaType: manifest.Layers[i].MediaType}
		if lazy(i, len(layers)) {
			d := manifestLazy.Layers[i]
			a = mutate.Addendum{Layer: layersLazy[i], MediaType: d.MediaType, Annotations: d.Annotations}
		}
		image, err = mutate.Append(image, a)
		must(t, err)
	}
	return saveLayout(t, image)
}

// layerDigests returns the digests of the layers of an image, as in its manifest.
func layerDigests(t testing.TB, dir string) []string {
	t.Helper()
	_, m, _ := readLayout(t, dir)
	var list []string
	for _, l := range m.Layers {
		list = append(list, l.Digest.String())
	}
	return list
}

// fetchedWhole returns which of the layers somebody has asked the registry for without a range.
func fetchedWhole(registry *Registry, layers []string) []string {
	var list []string
	for _, q := range registry.Log() {
		if digest := filepath.Base(q.Path); q.Method == "GET" && q.Range == "" && slices.Contains(layers, digest) && !slices.Contains(list, digest) {
			list = append(list, digest)
		}
	}
	return list
}

// both returns what two lists have in common.
func both(a, b []string) []string {
	return slices.DeleteFunc(slices.Clone(a), func(s string) bool { return !slices.Contains(b, s) })
}

// A node is a daemon and a containerd that has it for a snapshotter.
type node struct {
	*Containerd
	daemon *Daemon
}

// startNode starts both. Of the options for containerd those that have to do with the daemon are filled in.
func startNode(t testing.TB, d daemonOptions, c containerdOptions) *node {
	t.Helper()
	if c.Dir == "" {
		c.Dir = shortDir(t)
	}
	d.Containerd = containerdSocket(c.Dir)
	n := &node{daemon: startDaemon(t, d)}
	c.Snapshotter, c.Root = n.daemon.Socket, n.daemon.Root
	n.Containerd = startContainerd(t, c)
	return n
}

// traces is what there is of the node: mounts, loop devices and processes, and what the daemon keeps of snapshots. Objects and tables of
// contents are a cache and stay.
func (n *node) traces() []string {
	list := append(residue(n.daemon.Dir), residue(n.Dir)...)
	for _, sub := range []string{"snapshots/*/", "chains/*", "store/meta/*"} {
		kept, _ := filepath.Glob(filepath.Join(n.daemon.Root, sub))
		list = append(list, kept...)
	}
	return list
}

// settle waits until there is nothing that was not there before: what is removed is cleaned up behind.
func (n *node) settle(t testing.TB, before []string) {
	t.Helper()
	var left []string
	for end, next := time.Now().Add(patience), time.Now(); ; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(next) {
			// containerd removes snapshots when it collects garbage, which it puts off while the machine is busy, unless it is told to.
			n.ctr("leases", "create", "--id", "settle")
			n.ctr("leases", "delete", "--sync", "settle")
			next = time.Now().Add(5 * time.Second)
		}
		left = slices.DeleteFunc(n.traces(), func(s string) bool { return slices.Contains(before, s) })
		if len(left) == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("left behind:\n%s", strings.Join(left, "\n"))
		}
	}
}

// engines are the ways in which containerd is run here.
var engines = []struct {
	name string
	o    containerdOptions
}{
	{"2.4", containerdOptions{}},
	{"2.4, CRI without the transfer service", containerdOptions{LocalPull: true}},
	{"1.6", containerdOptions{Old: true}},
}

// TestPullRun: an image that was converted is pulled and run by ctr and by crictl, two containers at once, and taken away again without
// a trace. Nobody fetches a layer, but for ctr 1.6, which does not tell a snapshotter of which layer a snapshot is.
func TestPullRun(t *testing.T) {
	needRoot(t)
	registry := NewRegistry(t, RegistryOptions{Distribution: true})
	layout, want := jobImage(t)
	layers := layerDigests(t, layout)
	image, pause := registry.Push(t, layout, "job"), registry.Push(t, pauseImage(t), "pause")

	for _, e := range engines {
		t.Run(e.name, func(t *testing.T) {
			e.o.Pause = pause
			n := startNode(t, daemonOptions{}, e.o)
			before := n.traces()
			// gone shows that all is as it was before.
			gone := func(t *testing.T, namespace string) {
				t.Helper()
				if s, c := n.snapshots(t, namespace), n.content(t, namespace); len(s) > 0 || len(c) > 0 {
					t.Errorf("left behind: snapshots %v, blobs %v", s, c)
				}
				n.settle(t, before)
			}
			t.Run("ctr", func(t *testing.T) {
				registry.Reset()
				must(t, n.pull(image))
				n.job(t, image, "a", want)
				_, err := n.run(image, "b", []string{"--detach"}, "sleep", "1000000")
				must(t, err)
				_, err = n.exec("b", "sh", "-c", "echo of b > /data/greeting")
				must(t, err)
				n.job(t, image, "c", want)
				if out, err := n.exec("b", "cat", "/data/greeting"); err != nil || out != "of b\n" {
					t.Errorf("exec: %q, %v", out, err)
				}
				if !e.o.Old {
					n.lazily(t, registry, layers, n.Namespace)
				}
				if slices.Equal(n.traces(), before) {
					t.Error("a container that runs leaves no traces: the test shows nothing")
				}
				n.mustCtr(t, "task", "delete", "--force", "b")
				n.mustCtr(t, "container", "delete", "b")
				n.mustCtr(t, "image", "delete", "--sync", image)
				gone(t, n.Namespace)
			})
			t.Run("crictl", func(t *testing.T) {
				registry.Reset()
				_, err := n.crictl("pull", image)
				must(t, err)
				p := n.pod(t)
				p.job(t, image, want)
				b := p.start(t, image, "sleep", "1000000")
				_, err = n.crictl("exec", "--sync", b, "sh", "-c", "echo of b > /data/greeting")
				must(t, err)
				p.job(t, image, want)
				if out, err := n.crictl("exec", "--sync", b, "cat", "/data/greeting"); err != nil || out != "of b" {
					t.Errorf("exec: %q, %v", out, err)
				}
				n.lazily(t, registry, layers, "k8s.io")
				p.remove(t)
				_, err = n.crictl("rmi", image, pause)
				must(t, err)
				gone(t, "k8s.io")
			})
		})
	}
}

// TestChains: lazy and ordinary layers in any order are the tree that containerd's overlayfs snapshotter makes of the original image.
func TestChains(t *testing.T) {
	needRoot(t)
	registry := NewRegistry(t, RegistryOptions{})
	ordinary, img := worstImage(t, worst.Options{})
	converted := convertLayout(t, ordinary, convert.Options{})
	many, manyImg := changesImage(t, 20)
	manyConverted := convertLayout(t, many, convert.Options{})
	most, mostImg := changesImage(t, 127) // containerd's limit for overlayfs
	mostConverted := convertLayout(t, most, convert.Options{})

	n := startNode(t, daemonOptions{}, containerdOptions{})
	before := n.traces()
	for _, c := range []struct {
		name                string
		ordinary, converted string
		img                 *worst.Image
		lazy                func(i, of int) bool
	}{
		{"all lazy", ordinary, converted, img, func(i, of int) bool { return true }},
		{"all ordinary", ordinary, converted, img, func(i, of int) bool { return false }},
		{"lazy under ordinary", ordinary, converted, img, func(i, of int) bool { return i < of/2 }},
		{"ordinary under lazy", ordinary, converted, img, func(i, of int) bool { return i >= of/2 }},
		{"lazy, ordinary, lazy…", ordinary, converted, img, func(i, of int) bool { return i%2 == 0 }},
		{"20 layers, lazy, ordinary, lazy…", many, manyConverted, manyImg, func(i, of int) bool { return i%2 == 0 }},
		{"20 layers, ordinary, lazy, ordinary…", many, manyConverted, manyImg, func(i, of int) bool { return i%2 == 1 }},
		{"127 layers, all lazy", most, mostConverted, mostImg, func(i, of int) bool { return true }},
		{"127 layers, lazy, ordinary, lazy…", most, mostConverted, mostImg, func(i, of int) bool { return i%2 == 0 }},
	} {
		t.Run(c.name, func(t *testing.T) {
			mixed := mixLayouts(t, c.ordinary, c.converted, c.lazy)
			image := registry.Push(t, mixed, "chain")
			registry.Reset()
			must(t, n.pull(image))
			// From the first ordinary layer on containerd begins to fetch all of them.
			layers := layerDigests(t, mixed)
			var below, whole []string
			for i, l := range layers {
				if !c.lazy(i, len(layers)) {
					whole = append(whole, l)
				} else if len(whole) == 0 {
					below = append(below, l)
				}
			}
			n.lazily(t, registry, below, n.Namespace)
			if list := both(whole, n.content(t, n.Namespace)); len(list) != len(whole) {
				t.Errorf("of the ordinary layers %v, %v were unpacked by containerd", whole, list)
			}
			n.fidelity(t, n.Namespace, image, mixed, c.ordinary, c.img)
			n.mustCtr(t, "image", "delete", "--sync", image)
			n.settle(t, before)
		})
	}

	t.Run("all lazy, CRI of 1.6", func(t *testing.T) {
		n := startNode(t, daemonOptions{}, containerdOptions{Old: true, Pause: registry.Addr + "/none"})
		image := registry.Push(t, converted, "chain16")
		registry.Reset()
		_, err := n.crictl("pull", image)
		must(t, err)
		if list := fetchedWhole(registry, layerDigests(t, converted)); len(list) > 0 {
			t.Errorf("layers that were fetched: %v", list)
		}
		n.fidelity(t, "k8s.io", image, converted, ordinary, img)
	})
}

// fidelity shows that an image of a layout, which has been pulled, is the tree that containerd's overlayfs snapshotter makes of another.
func (n *node) fidelity(t testing.TB, namespace, image, pulled, original string, img *worst.Image) {
	t.Helper()
	same := func(how, dir string) {
		t.Helper()
		got, err := Snapshot(dir)
		must(t, err)
		report(t, "containerd, "+how, Compare(containerd(t, original), got), containerdDiffers(img))
	}
	dir, undo := n.mount(t, namespace, chainID(t, pulled))
	same("for a container", dir)
	undo()
	if !n.o.Old {
		dir, undo = n.view(t, namespace, image)
		same("read-only", dir)
		undo()
	}
}

// chainID returns the name that containerd gives to the highest layer's snapshot
// (https://github.com/opencontainers/image-spec/blob/main/config.md#layer-chainid).
func chainID(t testing.TB, dir string) string {
	t.Helper()
	image, _, _ := readLayout(t, dir)
	config, err := image.ConfigFile()
	must(t, err)
	id := ""
	for i, d := range config.RootFS.DiffIDs {
		if i == 0 {
			id = d.String()
		} else {
			id = fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(id+" "+d.String())))
		}
	}
	return id
}

// changesImage makes an image of n ordinary layers, each of which adds, changes, replaces and removes something of those below.
func changesImage(t testing.TB, n int) (string, *worst.Image) {
	t.Helper()
	second := int64(1_700_000_000)
	var layers []v1.Layer
	for i := range n {
		layers = append(layers, tarLayer(t, func(add func(tar.Header, []byte)) {
			entry := func(typeflag byte, name, content string) {
				second++
				h := tar.Header{Typeflag: typeflag, Name: name, Mode: 0o640, Uid: i, Gid: 2 * i, ModTime: time.Unix(second, int64(i)*1_000_003),
					PAXRecords: map[string]string{"SCHILY.xattr.user.layer": fmt.Sprint(i)}}
				switch typeflag {
				case tar.TypeDir:
					h.Mode = 0o750
				case tar.TypeLink, tar.TypeSymlink:
					h.Linkname, content, h.PAXRecords = content, "", nil
				}
				add(h, []byte(content))
			}
			for _, d := range []string{"all/", "all/files/", "all/links/", "all/changes/"} {
				entry(tar.TypeDir, d, "")
			}
			// A file for good, one for three layers, one that each layer replaces.
			entry(tar.TypeReg, fmt.Sprintf("all/files/%d", i), strings.Repeat(fmt.Sprintf("layer %d\n", i), 1+i*1000))
			entry(tar.TypeReg, fmt.Sprintf("all/files/short-lived %d", i), "goes\n")
			if i >= 3 {
				entry(tar.TypeReg, fmt.Sprintf("all/files/.wh.short-lived %d", i-3), "")
			}
			entry(tar.TypeReg, "all/files/changes", fmt.Sprintf("in layer %d\n", i))
			// Hard links, which a higher layer takes apart.
			entry(tar.TypeReg, fmt.Sprintf("all/links/a%d", i), fmt.Sprintf("linked in layer %d\n", i))
			entry(tar.TypeLink, fmt.Sprintf("all/links/b%d", i), fmt.Sprintf("all/links/a%d", i))
			entry(tar.TypeSymlink, fmt.Sprintf("all/links/s%d", i), fmt.Sprintf("a%d", i))
			if i%5 == 4 {
				entry(tar.TypeReg, fmt.Sprintf("all/links/b%d", i-1), "on its own\n")
			}
			// One name that is a directory, a file, a symlink in turn, and one directory that hides what is below.
			switch i % 3 {
			case 0:
				entry(tar.TypeDir, "all/changes/type/", "")
				entry(tar.TypeReg, fmt.Sprintf("all/changes/type/%d", i), "in it\n")
			case 1:
				entry(tar.TypeReg, "all/changes/type", fmt.Sprintf("a file in layer %d\n", i))
			case 2:
				entry(tar.TypeSymlink, "all/changes/type", fmt.Sprintf("../files/%d", i))
			}
			entry(tar.TypeDir, "all/changes/opaque/", "")
			if i%4 == 3 {
				entry(tar.TypeReg, "all/changes/opaque/.wh..wh..opq", "")
			}
			entry(tar.TypeReg, fmt.Sprintf("all/changes/opaque/%d", i), "here\n")
		}))
	}
	return imageLayout(t, nil, layers...), &worst.Image{Unknown: []string{""}, HiddenLinks: nil}
}

// jobImage makes a lazy image to be run, as a layout, and returns what jobScript must print in it. Its last layer begins with a file of jobSize
// bytes.
func jobImage(t testing.TB) (layout, want string) {
	t.Helper()
	data := noise(7, jobSize)
	layout = convertLayout(t, runnableLayout(t, nil, tarLayer(t, func(add func(tar.Header, []byte)) {
		add(tar.Header{Name: "data/", Typeflag: tar.TypeDir, Mode: 0o755}, nil)
		add(tar.Header{Name: "data/noise", Typeflag: tar.TypeReg, Mode: 0o644}, data)
		add(tar.Header{Name: "data/greeting", Typeflag: tar.TypeReg, Mode: 0o644}, []byte("hello\n"))
	})), convert.Options{})
	return layout, fmt.Sprintf("%x  /data/noise\nhello\nmine", sha256.Sum256(data))
}

const jobSize = 3 << 20

// jobScript reads, writes, and reads what it has written.
var jobScript = []string{"sh", "-c", "sha256sum /data/noise; cat /data/greeting; echo mine > /data/greeting; cat /data/greeting"}

// pauseImage makes the image of a sandbox, as a layout.
func pauseImage(t testing.TB) string { return runnableLayout(t, []string{"sleep", "1000000"}) }

// job has ctr run the job to its end, and shows that its output is right.
func (n *node) job(t testing.TB, image, id, want string) {
	t.Helper()
	out, err := n.run(image, id, nil, jobScript...)
	if out = strings.TrimSpace(out); err != nil || out != want {
		t.Errorf("container %s: %v, output\n%s\nwant\n%s", id, err, out, want)
	}
}

// job has crictl run the job in a container of the pod, and shows that its output is right.
func (p *pod) job(t testing.TB, image, want string) {
	t.Helper()
	if out := p.output(t, p.start(t, image, jobScript...)); out != want {
		t.Errorf("container %d of the pod: output\n%s\nwant\n%s", p.containers, out, want)
	}
}

// lazily shows that nobody has fetched a layer from the registry, and that the namespace has none.
func (n *node) lazily(t testing.TB, registry *Registry, layers []string, namespace string) {
	t.Helper()
	if list := fetchedWhole(registry, layers); len(list) > 0 {
		t.Errorf("layers that were fetched: %v", list)
	}
	if list := both(n.content(t, namespace), layers); len(list) > 0 {
		t.Errorf("layers in the content store: %v", list)
	}
}

// TestPassword: a registry that asks for a password, which the daemon has from docker's configuration, or from the CRI pull that it
// passed on and remembers when it is started again.
func TestPassword(t *testing.T) {
	needRoot(t)
	const user, password = "me", "secret"
	layout, want := jobImage(t)
	layers := layerDigests(t, layout)
	var closed atomic.Bool // to those who want data of the last layer
	registry := NewRegistry(t, RegistryOptions{Distribution: true, User: user, Password: password, Bearer: true, Wrap: func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			var first int64
			fmt.Sscanf(q.Header.Get("Range"), "bytes=%d-", &first)
			if closed.Load() && filepath.Base(q.URL.Path) == layers[len(layers)-1] && first < jobSize {
				w.WriteHeader(http.StatusServiceUnavailable)
				return
			}
			next.ServeHTTP(w, q)
		})
	}})
	image := registry.Push(t, layout, "private/job")

	t.Run("docker's configuration", func(t *testing.T) {
		config := t.TempDir()
		auth := base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
		must(t, os.WriteFile(config+"/config.json", fmt.Appendf(nil, `{"auths": {%q: {"auth": %q}}}`, registry.Addr, auth), 0o600))
		n := startNode(t, daemonOptions{Env: []string{"DOCKER_CONFIG=" + config}}, containerdOptions{})
		if err := n.pull(image, "--user", user+":wrong"); err == nil {
			t.Error("pulled with a wrong password")
		}
		registry.Reset()
		must(t, n.pull(image, "--user", user+":"+password))
		n.lazily(t, registry, layers, n.Namespace)
		n.job(t, image, "a", want)
	})
	t.Run("CRI", func(t *testing.T) {
		pause := NewRegistry(t, RegistryOptions{}).Push(t, pauseImage(t), "pause")
		dir := shortDir(t)
		n := startNode(t, daemonOptions{}, containerdOptions{Pause: pause, Dir: dir, ThroughDaemon: true})
		if _, err := n.crictl("pull", "--creds", user+":wrong", image); err == nil {
			t.Error("pulled with a wrong password")
		}
		closed.Store(true)
		registry.Reset()
		_, err := n.crictl("pull", "--creds", user+":"+password, image)
		must(t, err)
		n.lazily(t, registry, layers, "k8s.io")
		n.daemon.stop(t)
		n.daemon.start(t)
		closed.Store(false)
		p := n.pod(t)
		p.job(t, image, want)
		p.remove(t)

		kept := 0
		must(t, filepath.WalkDir(n.daemon.Root+"/credentials", func(path string, e fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			fi, err := e.Info()
			if err == nil && fi.Mode().Perm()&0o077 != 0 {
				t.Errorf("%s: mode %v, which is not for root only", path, fi.Mode())
			}
			if !e.IsDir() {
				kept++
			}
			return err
		}))
		if kept == 0 {
			t.Error("no credentials are kept")
		}
	})
}

// TestTLS: a registry with a certificate of its own CA, which both daemon and containerd trust because of certs.d, and one that certs.d
// has a mirror for.
func TestTLS(t *testing.T) {
	needRoot(t)
	layout, want := jobImage(t)
	layers := layerDigests(t, layout)
	registry := NewRegistry(t, RegistryOptions{Distribution: true, TLS: true})
	image, pause := registry.Push(t, layout, "secure/job"), registry.Push(t, pauseImage(t), "pause")
	hosts := t.TempDir()
	must(t, os.WriteFile(hosts+"/ca.pem", registry.CA, 0o644))
	hostsToml := func(name, server string) {
		must(t, os.Mkdir(filepath.Join(hosts, name), 0o755))
		must(t, os.WriteFile(filepath.Join(hosts, name, "hosts.toml"), fmt.Appendf(nil, "server = %q\n[host.%q]\ncapabilities = [\"pull\", \"resolve\"]\nca = %q\n",
			server, "https://"+registry.Addr, hosts+"/ca.pem"), 0o644))
	}
	hostsToml(registry.Addr, "https://"+registry.Addr)
	hostsToml("images.invalid", "https://images.invalid")
	mirrored := "images.invalid/secure/job:latest"

	for _, e := range []struct {
		name string
		o    containerdOptions
	}{{"2.4", containerdOptions{}}, {"1.6", containerdOptions{Old: true}}} {
		t.Run(e.name, func(t *testing.T) {
			e.o.Pause, e.o.Hosts = pause, hosts
			n := startNode(t, daemonOptions{Hosts: hosts}, e.o)
			if !e.o.Old {
				for i, ref := range []string{image, mirrored} {
					registry.Reset()
					must(t, n.pull(ref))
					n.lazily(t, registry, layers, n.Namespace)
					n.job(t, ref, fmt.Sprint(i), want)
					n.mustCtr(t, "image", "delete", "--sync", ref)
				}
			}
			for _, ref := range []string{image, mirrored} {
				registry.Reset()
				_, err := n.crictl("pull", ref)
				must(t, err)
				n.lazily(t, registry, layers, "k8s.io")
				p := n.pod(t)
				p.job(t, ref, want)
				p.remove(t)
				_, err = n.crictl("rmi", ref)
				must(t, err)
			}
		})
	}
}
