package snapshotter

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http"
	"net/http/httptest"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	ggcr "github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"lazuli/convert"
	"lazuli/fs/remote"
	"lazuli/fs/toc"
)

// A hub is a registry that notes what it is asked for, but for look-ups of startup packs: nobody waits for those, so that they come at any time.
type hub struct {
	addr string
	// before, if set, is called with each of them before it is answered.
	before func(request string)

	mu    sync.Mutex
	asked []string // "blobs DIGEST RANGE", of GETs
}

func newHub(t *testing.T) *hub {
	t.Helper()
	h := &hub{}
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if dir, last := path.Split(r.URL.Path); r.Method == http.MethodGet && path.Base(dir) != "v2" &&
			path.Base(dir) != "referrers" && !strings.HasPrefix(last, "sha256-") && last != "lazuli-pack" {
			request := strings.Join([]string{path.Base(dir), last, r.Header.Get("Range")}, " ")
			h.mu.Lock()
			h.asked = append(h.asked, request)
			h.mu.Unlock()
			if h.before != nil {
				h.before(request)
			}
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	h.addr = s.Listener.Addr().String()
	return h
}

// requests returns what the hub was asked since the last call.
func (h *hub) requests() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	list := h.asked
	h.asked = nil
	return list
}

// An img is an image in a hub.
type img struct {
	ref      string
	digest   v1.Hash
	manifest *v1.Manifest
	diffIDs  []v1.Hash // as its config claims them
	image    v1.Image
}

// push puts an image into the hub.
func (h *hub) push(t *testing.T, repo string, image v1.Image) *img {
	t.Helper()
	i := &img{ref: h.addr + "/" + repo + ":latest", image: image}
	ref, err := name.ParseReference(i.ref)
	must(t, err)
	must(t, ggcr.Write(ref, image))
	i.digest, err = image.Digest()
	must(t, err)
	i.manifest, err = image.Manifest()
	must(t, err)
	config, err := image.ConfigFile()
	must(t, err)
	i.diffIDs = config.RootFS.DiffIDs
	return i
}

// lazy makes an image, whose layers have a file f in data with the content that is given for each, and converts it.
func (h *hub) lazy(t *testing.T, repo string, o convert.Options, contents ...string) *img {
	t.Helper()
	image := empty.Image
	for i, c := range contents {
		layer := tarLayer(t, map[string]string{fmt.Sprintf("data/f%d", i): c, fmt.Sprintf("data/g%d", i): strings.ToUpper(c)})
		var err error
		image, err = mutate.AppendLayers(image, layer)
		must(t, err)
	}
	plain := h.push(t, repo+"-plain", image)
	src, err := remote.ParseReference(plain.ref)
	must(t, err)
	dst, err := remote.ParseReference(h.addr + "/" + repo + ":latest")
	must(t, err)
	_, err = convert.Image(t.Context(), src, dst, o)
	must(t, err)
	image, err = ggcr.Image(dst.Name())
	must(t, err)
	defer h.requests()
	return h.push(t, repo, image)
}

func tarLayer(t *testing.T, files map[string]string) v1.Layer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		must(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(files[name]))}))
		_, err := io.WriteString(w, files[name])
		must(t, err)
	}
	must(t, w.Close())
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	must(t, err)
	return l
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// from returns the digests of layer i and those above it, as labels have them.
func (im *img) from(i int) string {
	var list []string
	for _, l := range im.manifest.Layers[i:] {
		list = append(list, l.Digest.String())
	}
	return strings.Join(list, ",")
}

// criLabels are what containerd 2 says of a layer.
func (im *img) criLabels(i int) map[string]string {
	return map[string]string{
		labelRef: im.ref, labelManifest: im.digest.String(), labelLayer: im.manifest.Layers[i].Digest.String(),
		labelLayers: im.from(i), labelDiffID: im.diffIDs[i].String(),
	}
}

// oldLabels are what containerd 1 says.
func (im *img) oldLabels(i int) map[string]string {
	l := im.criLabels(i)
	delete(l, labelDiffID)
	return l
}

// stargzLabels are what clients say that are made for stargz-snapshotter: the annotations of the layer's descriptor, and what
// AppendDefaultLabelsHandlerWrapper adds to them
// (https://github.com/containerd/stargz-snapshotter/blob/v0.19.1/fs/source/source.go).
func (im *img) stargzLabels(i int) map[string]string {
	l := map[string]string{
		"containerd.io/snapshot/remote/stargz.reference": im.ref,
		"containerd.io/snapshot/remote/stargz.digest":    im.manifest.Layers[i].Digest.String(),
		"containerd.io/snapshot/remote/stargz.layers":    im.from(i),
		"containerd.io/snapshot/remote/urls":             "",
	}
	for k, v := range im.manifest.Layers[i].Annotations {
		if strings.HasPrefix(k, "containerd.io/snapshot/") {
			l[k] = v
		}
	}
	return l
}

// chain returns what containerd calls the chain of the layers up to i.
func (im *img) chain(i int) string {
	id := im.diffIDs[0].String()
	for _, d := range im.diffIDs[1 : i+1] {
		id = fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(id+" "+d.String())))
	}
	return id
}

var extractions int

// prepare asks for a layer above parent as containerd does before it unpacks it. It returns the name of the snapshot that is there
// already, as containerd looks for it, or the key of the one that the layer is to be unpacked into.
func prepare(t *testing.T, s *Snapshotter, target, parent string, labels map[string]string) (name string, lazy bool) {
	t.Helper()
	extractions++
	key := fmt.Sprintf("ns/%d/extract %s", extractions, target)
	labels = maps.Clone(labels)
	labels[snapshots.LabelSnapshotRef] = target
	_, err := s.Prepare(t.Context(), key, parent, snapshots.WithLabels(labels))
	if err == nil {
		return key, false
	}
	if !errdefs.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	filter := fmt.Sprintf("labels.%q==%s,parent==%q", snapshots.LabelSnapshotRef, target, parent)
	must(t, s.Walk(t.Context(), func(_ context.Context, i snapshots.Info) error {
		if i.Kind == snapshots.KindCommitted && i.Labels[snapshots.LabelSnapshotRef] == target && i.Parent == parent {
			name = cmp.Or(name, i.Name)
		}
		return nil
	}, filter))
	if name == "" {
		t.Fatalf("no snapshot is called %s", target)
	}
	return name, true
}

// pull asks for all layers of an image and returns the name of the topmost snapshot. All must be lazy.
func (im *img) pull(t *testing.T, s *Snapshotter, labels func(i int) map[string]string) string {
	t.Helper()
	top := ""
	for i := range im.manifest.Layers {
		var lazy bool
		if top, lazy = prepare(t, s, im.chain(i), top, labels(i)); !lazy {
			t.Fatalf("layer %d of %s is to be unpacked: %+v", i, im.ref, s.Fallbacks())
		}
	}
	return top
}

// start prepares a snapshot as for a container, and returns where its root is. It ends with the test.
func start(t *testing.T, s *Snapshotter, key, parent string) string {
	t.Helper()
	mounts, err := s.Prepare(t.Context(), key, parent)
	must(t, err)
	return source(t, mounts)
}

func source(t *testing.T, mounts []mount.Mount) string {
	t.Helper()
	if len(mounts) != 1 || mounts[0].Type != "bind" {
		t.Fatalf("mounts %v, want a bind mount", mounts)
	}
	return mounts[0].Source
}

// opened is open for a test, with a root folder that goes with it.
func opened(t *testing.T, o Options) *Snapshotter {
	t.Helper()
	needRoot(t)
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	s, _, closed, err := open(t.Context(), t.TempDir(), o)
	must(t, err)
	t.Cleanup(func() { must(t, closed()) })
	return s
}

// TestLabels: whoever says which layer it is, a lazy image is one chain of lazy layers, and one image in the list.
func TestLabels(t *testing.T) {
	for _, format := range []convert.Format{convert.EStargz, convert.ZstdChunked} {
		h := newHub(t)
		im := h.lazy(t, "image", convert.Options{Format: format}, "a", "b", "c")
		for _, who := range []struct {
			name   string
			labels func(i int) map[string]string
		}{{"containerd 2", im.criLabels}, {"containerd 1", im.oldLabels}, {"stargz", im.stargzLabels}} {
			t.Run(fmt.Sprint(format, " ", who.name), func(t *testing.T) {
				s := opened(t, Options{})
				dir := start(t, s, "container", im.pull(t, s, who.labels))
				wantFile(t, dir, "data/f0", "a")
				wantFile(t, dir, "data/g2", "C")
				images, err := s.node.Images()
				must(t, err)
				if len(images) != 1 || images[0].Digest != im.digest.String() || images[0].Reference != im.ref || len(images[0].Layers) != 3 || !images[0].InUse {
					t.Errorf("images %+v, want %s with 3 layers", images, im.digest)
				}
			})
		}
	}
}

// TestLabelsOfAnother: a layer that is not what the labels say, or about which they say too little, is left to containerd.
func TestLabelsOfAnother(t *testing.T) {
	h := newHub(t)
	im := h.lazy(t, "image", convert.Options{}, "a")
	other := h.lazy(t, "other", convert.Options{}, "b")
	h.push(t, "image", other.image)
	h.push(t, "image", im.image) // has the tag again
	with := func(change func(l map[string]string)) map[string]string {
		l := im.stargzLabels(0)
		change(l)
		return l
	}
	s := opened(t, Options{})
	for _, c := range []struct {
		name, why string // "" if it is no fallback: nobody said that it could be lazy
		labels    map[string]string
	}{
		{"nothing", "", map[string]string{}},
		{"no reference", "", with(func(l map[string]string) { delete(l, labelStargzRef) })},
		{"a reference that is none", "", with(func(l map[string]string) { l[labelStargzRef] = "no such/Reference" })},
		{"a layout on this node", "", with(func(l map[string]string) { l[labelStargzRef] = "oci:/etc" })},
		{"no layer", "", with(func(l map[string]string) { delete(l, labelStargzLayer) })},
		{"a layer of another image", "has no layer", with(func(l map[string]string) { l[labelStargzLayer] = other.manifest.Layers[0].Digest.String() })},
		{"another table of contents", "another table of contents than the label", with(func(l map[string]string) {
			l[toc.DigestAnnotation] = other.manifest.Layers[0].Annotations[toc.DigestAnnotation]
		})},
		{"another manifest", "has no layer", with(func(l map[string]string) { l[labelManifest] = other.digest.String() })},
		{"a manifest that is not there", "not found", with(func(l map[string]string) { l[labelManifest] = im.diffIDs[0].String() })},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := len(s.Fallbacks())
			key, lazy := prepare(t, s, "sha256:"+strings.Repeat("0", 64), "", c.labels)
			if lazy {
				t.Fatal("it is lazy")
			}
			must(t, s.Remove(t.Context(), key))
			list := s.Fallbacks()[before:]
			switch {
			case c.why == "" && len(list) > 0:
				t.Errorf("it was said to have been tried: %+v", list)
			case c.why != "" && (len(list) != 1 || !strings.Contains(list[0].Why, c.why)):
				t.Errorf("why it is not lazy: %+v, want %q", list, c.why)
			}
		})
	}
	im.pull(t, s, im.stargzLabels) // none of that is remembered
}
