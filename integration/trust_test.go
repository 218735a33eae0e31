package integration

import (
	"archive/tar"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"lazuli/convert"
	"lazuli/fs/rootfs"
	"lazuli/fs/toc"
	"lazuli/integration/worst"
)

// claiming is a layer whose image says that it has another diffID.
type claiming struct {
	v1.Layer
	diffID v1.Hash
}

func (c claiming) DiffID() (v1.Hash, error) { return c.diffID, nil }

// remade makes an image of the layers of a layout. edit changes what is said of the layers.
func remade(t testing.TB, dir string, edit func(i int, a *mutate.Addendum)) string {
	t.Helper()
	old, manifest, layers := readLayout(t, dir)
	config, err := old.ConfigFile()
	must(t, err)
	config = config.DeepCopy()
	config.RootFS.DiffIDs, config.History = nil, nil
	image, err := mutate.ConfigFile(empty.Image, config)
	must(t, err)
	for i, l := range layers {
		a := mutate.Addendum{Layer: l, MediaType: manifest.Layers[i].MediaType, Annotations: manifest.Layers[i].Annotations}
		edit(i, &a)
		image, err = mutate.Append(image, a)
		must(t, err)
	}
	return saveLayout(t, image)
}

// lying makes an image with the layers of one layout that claims to have the diffIDs of another.
func lying(t testing.TB, layers, claimed string) string {
	t.Helper()
	other, _, _ := readLayout(t, claimed)
	config, err := other.ConfigFile()
	must(t, err)
	return remade(t, layers, func(i int, a *mutate.Addendum) { a.Layer = claiming{a.Layer, config.RootFS.DiffIDs[i]} })
}

// whoImage makes an ordinary image to be run, of two layers, that has a text in data/who.
func whoImage(t testing.TB, who string) string {
	t.Helper()
	return runnableLayout(t, nil, tarLayer(t, func(add func(tar.Header, []byte)) {
		add(tar.Header{Name: "data/", Typeflag: tar.TypeDir, Mode: 0o755}, nil)
		add(tar.Header{Name: "data/who", Typeflag: tar.TypeReg, Mode: 0o644}, []byte(who))
	}))
}

// in returns the node with ctr in another namespace.
func (n *node) in(t testing.TB, namespace string) *node {
	t.Helper()
	c := *n.Containerd
	c.Namespace = n.Namespace + namespace
	t.Cleanup(func() {
		for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
			list, _ := filepath.Glob(pattern + c.Namespace)
			for _, dir := range list {
				removeCgroup(dir)
			}
		}
	})
	return &node{&c, n.daemon}
}

var containers int

// who runs a container that says who its image is.
func (n *node) who(image string) (string, error) {
	containers++
	return n.run(image, fmt.Sprint("who", containers), nil, "cat", "/data/who")
}

func (n *node) is(t testing.TB, image, want string) {
	t.Helper()
	if got, err := n.who(image); err != nil || got != want {
		t.Errorf("a container of %s is %q, %v, want %q", image, got, err, want)
	}
}

// refuses shows that no container of an image starts any more, because the image lies.
func (n *node) refuses(t testing.TB, image string) {
	t.Helper()
	got, err := n.who(image)
	if err == nil {
		t.Errorf("a container of %s started: it is %q", image, got)
		return
	}
	says(t, err.Error(), "the image lies about its layer", "remove it")
}

// truth asks for the status, with what is verified first, and shows that it says whether an image lies.
func (d *Daemon) truth(t testing.TB, liar string, options ...string) {
	t.Helper()
	out, err := d.lazuli(append([]string{"status"}, options...)...)
	if liar == "" {
		if err != nil || strings.Contains(out, "LIES") {
			t.Errorf("status %q: %v\n%s", options, err, out)
		}
		return
	}
	if err == nil || !strings.Contains(err.Error(), "exit status 1") {
		t.Errorf("status %q: %v, want exit status 1", options, err)
		return
	}
	says(t, err.Error(), "an image lies about its layers")
	says(t, out, "LIES", liar, "claims the diffID")
	says(t, d.logged(t), "an image lies about a layer: nothing starts from it any more", liar)
}

// TestLiar: an image that claims the layers of another.
func TestLiar(t *testing.T) {
	needRoot(t)
	registry := NewRegistry(t, RegistryOptions{})
	honestPlain := whoImage(t, "honest")
	honestLayout := convertLayout(t, honestPlain, convert.Options{})
	liarLayout := convertLayout(t, whoImage(t, "a liar"), convert.Options{})
	honest := registry.Push(t, honestLayout, "honest")
	plain := registry.Push(t, honestPlain, "plain")
	liar := registry.Push(t, lying(t, liarLayout, honestLayout), "attacker/liar")
	liarToPlain := registry.Push(t, lying(t, liarLayout, honestPlain), "attacker/plain")
	layers := layerDigests(t, honestLayout)

	t.Run("another namespace", func(t *testing.T) {
		a := startNode(t, daemonOptions{}, containerdOptions{})
		b := a.in(t, "b")
		must(t, a.pull(liar))
		a.is(t, liar, "a liar")
		registry.Reset()
		must(t, b.pull(honest))
		b.lazily(t, registry, layers, b.Namespace)
		b.is(t, honest, "honest")
		says(t, a.daemon.logged(t), "two images claim the same layer with different content")
		a.refuses(t, liar)
		a.daemon.truth(t, "attacker/liar")
	})

	// containerd finds the chain by its name, and asks nobody.
	t.Run("the same namespace", func(t *testing.T) {
		n := startNode(t, daemonOptions{}, containerdOptions{})
		must(t, n.pull(liar))
		must(t, n.pull(honest))
		n.is(t, honest, "a liar")
		n.daemon.truth(t, "")

		registry.Reset()
		n.daemon.truth(t, "attacker/liar", "--verify")
		ranges := registry.Log()
		if len(ranges) != len(layers) {
			t.Errorf("verifying %d layers took %d requests: %+v", len(layers), len(ranges), ranges)
		}
		for _, q := range ranges {
			if q.Status != http.StatusOK || q.Range != "" {
				t.Errorf("%+v, want all of a layer", q)
			}
		}
		registry.Reset()
		n.daemon.truth(t, "attacker/liar", "--verify")
		if again := registry.Log(); len(again) > 0 {
			t.Errorf("what was verified was fetched again: %+v", again)
		}
		n.refuses(t, liar)
		n.refuses(t, honest)

		// What is to be done.
		n.mustCtr(t, "image", "delete", "--sync", liar, honest)
		must(t, n.pull(honest))
		n.is(t, honest, "honest")
		n.daemon.truth(t, "", "--verify")
	})

	t.Run("an ordinary image", func(t *testing.T) {
		a := startNode(t, daemonOptions{}, containerdOptions{})
		b, c := a.in(t, "b"), a.in(t, "c")
		must(t, a.pull(liarToPlain))
		a.is(t, liarToPlain, "a liar")
		must(t, b.pull(plain))
		b.is(t, plain, "honest")
		// What was unpacked is known to be true, and what claims to be the same gets it.
		must(t, c.pull(liarToPlain))
		c.is(t, liarToPlain, "honest")
	})

	// An image that was converted twice is no lie.
	t.Run("twins", func(t *testing.T) {
		small := convertLayout(t, honestPlain, convert.Options{Format: convert.ZstdChunked, ChunkSize: 16 << 10})
		large := convertLayout(t, honestPlain, convert.Options{Format: convert.ZstdChunked})
		if chainID(t, small) != chainID(t, large) || slices.Equal(layerDigests(t, small), layerDigests(t, large)) {
			t.Fatal("they are no twins")
		}
		one, two := registry.Push(t, small, "one"), registry.Push(t, large, "two")
		a := startNode(t, daemonOptions{}, containerdOptions{})
		b := a.in(t, "b")
		must(t, a.pull(one))
		must(t, b.pull(two))
		a.is(t, one, "honest")
		b.is(t, two, "honest")
		a.daemon.truth(t, "", "--verify")
	})
}

// TestGarbled: what comes of an image is not what was pushed, or its table of contents is not its own. Pulls and reads fail with a
// reason, or the image is unpacked as usual; everything else works on, and nothing half-made is left.
func TestGarbled(t *testing.T) {
	needRoot(t)
	s := &spoiler{}
	registry := NewRegistry(t, RegistryOptions{Wrap: s.wrap})
	layout, sums := pieces(t, 1)
	report, err := rootfs.Inspect(t.Context(), parse(t, "oci:"+layout), rootfs.InspectOptions{})
	must(t, err)
	layer := report.Layers[1]
	image, other := registry.Push(t, layout, "garbled"), registry.Push(t, convertLayout(t, whoImage(t, "other"), convert.Options{}), "other")
	n := startNode(t, daemonOptions{}, containerdOptions{})
	must(t, n.pull(other))
	before, kept := n.snapshots(t, n.Namespace), n.daemon.kept(t)
	works := func(t *testing.T) {
		t.Helper()
		n.is(t, other, "other")
		if out, err := n.daemon.get("/healthz"); err != nil {
			t.Errorf("%q, %v", out, err)
		}
	}
	flip := func(where int64) func([]byte, int64) []byte {
		return func(b []byte, at int64) []byte {
			if i := where - at; i >= 0 && i < int64(len(b)) {
				b = slices.Clone(b)
				b[i] ^= 0x40
			}
			return b
		}
	}
	match := func(q *http.Request) bool { return strings.Contains(q.URL.Path, layer.Digest) }

	for _, c := range []struct {
		name, why string
		spoil     func(body []byte, at int64) []byte
	}{
		{"table of contents garbled", "toc", flip(layer.Size - layer.TOCSize + 100)},
		{"truncated", "EOF", func(b []byte, _ int64) []byte { return b[:len(b)/2] }},
	} {
		t.Run(c.name, func(t *testing.T) {
			s.match, s.spoil = match, c.spoil
			defer func() { s.match = nil }()
			if err := n.pull(image); err == nil {
				t.Error("it was pulled")
			}
			f := n.daemon.fallback(t, layer.Digest)
			says(t, f, c.why)
			// containerd collects what a pull left that failed when it sees fit.
			n.mustCtr(t, "content", "prune", "references")
			await(t, "snapshots", before, func() []string { return n.snapshots(t, n.Namespace) })
			await(t, "the store", kept, func() []string { return n.daemon.kept(t) })
			works(t)
		})
	}
	t.Run("a file garbled", func(t *testing.T) {
		must(t, n.pull(image))
		n.sleeper(t, image, "a")
		s.match, s.spoil = match, flip(1000)
		says(t, n.cannotRead(t, "a", 0), "read failed", layer.Digest, "chunk", "as the TOC says")
		works(t)
		s.match = nil
		n.readsAgain(t, "a", 0, sums[0])
	})
	t.Run("the manifest promises another table", func(t *testing.T) {
		wrong := registry.Push(t, remade(t, layout, func(i int, a *mutate.Addendum) {
			if i == 1 {
				a.Annotations[toc.DigestAnnotation] = "sha256:" + strings.Repeat("0", 64)
			}
		}), "wrong")
		ns := n.in(t, "wrong") // or containerd would not ask
		must(t, ns.pull(wrong))
		says(t, n.daemon.fallback(t, layer.Digest), "toc", "sha256:"+strings.Repeat("0", 64))
		ns.sleeper(t, wrong, "b")
		ns.reads(t, "b", 0, sums[0])
		works(t)
	})
	t.Run("the table has another chunk's digest", func(t *testing.T) {
		e := helloFile()
		i := strings.Index(e, `"chunkDigest":"sha256:`) + len(`"chunkDigest":"sha256:`)
		wrong := registry.Push(t, entriesImage(t, e[:i]+strings.Repeat("1", 64)+e[i+64:]), "chunk")
		must(t, n.pull(wrong))
		dir, undo := n.view(t, n.Namespace, wrong)
		defer undo()
		before := n.daemon.logged(t)
		if b, err := os.ReadFile(filepath.Join(dir, "f")); err == nil {
			t.Errorf("read %q", b)
		}
		says(t, strings.TrimPrefix(n.daemon.logged(t), before), "read failed", "chunk", strings.Repeat("1", 64), "as the TOC says")
		works(t)
	})
}

// kept returns what the store has of images but their objects: tables of contents, metadata images, and files that are being made.
func (d *Daemon) kept(t testing.TB) []string {
	t.Helper()
	var list []string
	for _, pattern := range []string{"tmp/*", "layers/*/*", "meta/*"} {
		found, err := filepath.Glob(filepath.Join(d.Root, "store", pattern))
		must(t, err)
		list = append(list, found...)
	}
	return list
}

// fallback returns what the log says last about why a layer was left to containerd.
func (d *Daemon) fallback(t testing.TB, layer string) string {
	t.Helper()
	last := ""
	for line := range strings.Lines(d.logged(t)) {
		if strings.Contains(line, "left to containerd to unpack") && strings.Contains(line, layer) {
			last = line
		}
	}
	return last
}

// await waits until something is as it should be.
func await(t testing.TB, what string, want []string, look func() []string) {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		got := look()
		if slices.Equal(got, want) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s: %q, want %q", what, got, want)
		}
	}
}

// TestStargzImages: images that others converted are pulled and run lazily too, and found to be what they claim.
func TestStargzImages(t *testing.T) {
	needRoot(t)
	registry := NewRegistry(t, RegistryOptions{})
	data := noise(7, jobSize)
	job := runnableLayout(t, nil, tarLayer(t, func(add func(tar.Header, []byte)) {
		add(tar.Header{Name: "data/", Typeflag: tar.TypeDir, Mode: 0o755}, nil)
		add(tar.Header{Name: "data/noise", Typeflag: tar.TypeReg, Mode: 0o644}, data)
		add(tar.Header{Name: "data/greeting", Typeflag: tar.TypeReg, Mode: 0o644}, []byte("hello\n"))
	}))
	_, want := jobImage(t)
	strange, _ := worstImage(t, worst.Options{})
	limited, _ := worstImage(t, worst.Options{Plain: true})
	n := startNode(t, daemonOptions{}, containerdOptions{})
	for i, c := range slices.Concat(stargzConversions, ourConversions, []conversion{skopeoConversion}) {
		t.Run(c.name, func(t *testing.T) {
			ns := n.in(t, fmt.Sprint(i))
			layout := c.convert(t, job)
			image := registry.Push(t, layout, fmt.Sprint("job", i))
			registry.Reset()
			must(t, ns.pull(image))
			ns.lazily(t, registry, layerDigests(t, layout), ns.Namespace)
			ns.job(t, image, "a", want)
			if list := fetchedWhole(registry, layerDigests(t, layout)); len(list) > 0 {
				t.Errorf("layers that were fetched: %v", list)
			}
			// Tables of contents that tell of strange trees are not taken for lies.
			of := strange
			if c.limited {
				of = limited
			}
			must(t, ns.pull(registry.Push(t, c.convert(t, of), fmt.Sprint("worst", i))))
			n.daemon.truth(t, "", "--verify")
		})
	}
	if said := n.daemon.logged(t); strings.Contains(said, "left to containerd") || strings.Contains(said, "is not lazy") {
		t.Error("some layers were not lazy")
	}
}

// skopeoConversion is containers/storage's zstd:chunked, as podman, buildah and skopeo push it.
var skopeoConversion = conversion{"skopeo, zstd:chunked", func(t testing.TB, layout string) string {
	needProgram(t, "skopeo")
	dir := filepath.Join(t.TempDir(), "skopeo")
	out, err := exec.Command("skopeo", "--insecure-policy", "copy", "--dest-compress", "--dest-compress-format", "zstd:chunked", "--dest-compress-level", "1",
		"oci:"+layout, "oci:"+dir+":latest").CombinedOutput()
	if err != nil {
		t.Fatalf("skopeo: %v\n%s", err, out)
	}
	return dir
}, true}
