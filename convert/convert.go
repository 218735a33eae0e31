package convert

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"sync"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sync/errgroup"

	"lazuli/fs/remote"
	"lazuli/fs/toc"
)

// A Result is what a conversion did.
type Result struct {
	// Digest and MediaType are of the manifest or index that DST's tag now names.
	Digest    v1.Hash         `json:"digest"`
	MediaType types.MediaType `json:"mediaType"`
	// Layers are in the order in which the manifests name them, each layer once.
	Layers []Layer `json:"layers"`
	// Uploaded is how many bytes were written to DST, in bytes; what was there already is not.
	Uploaded int64 `json:"uploaded"`
	// Missed are the names of the profile that no layer has, or that could not be moved.
	Missed []string `json:"missed,omitempty"`
	// Packs are the startup packs that the images have from this conversion.
	Packs []Pack `json:"packs,omitempty"`
	// Warnings are lines for the user: what went wrong without making the result a worse image.
	Warnings []string `json:"warnings,omitempty"`
}

// Outcome says what became of a layer.
type Outcome string

const (
	Converted Outcome = "converted"
	Reused    Outcome = "reused" // converted before
	Kept      Outcome = "kept"   // was lazy already
	Passed    Outcome = "passed" // is no tar, or not to be distributed
)

// A Layer is one layer before and after.
type Layer struct {
	Source  v1.Hash `json:"source"`
	Target  v1.Hash `json:"target"`
	Outcome Outcome `json:"outcome"`
	// Sizes are of the blobs, in bytes.
	SourceSize int64 `json:"sourceSize"`
	TargetSize int64 `json:"targetSize"`
}

// Annotations of a converted layer: from what and how it was made. They let the next conversion
// find it in DST.
const (
	sourceAnnotation  = "lazuli.convert.source"
	optionsAnnotation = "lazuli.convert.options"
)

// Keys of BuildKit's attestations, in an index.
const (
	attestationType   = "vnd.docker.reference.type"
	attestationDigest = "vnd.docker.reference.digest"
)

const (
	maxDepth     = 4       // of indexes within indexes
	maxManifests = 1024    // of one conversion
	maxConfig    = 8 << 20 // bytes
	maxOthers    = 8       // images of DST that are asked what was converted before
	sideBySide   = 8       // layers converted at once: enough to keep a network busy
)

// Image converts the image or index that src names and writes the result to dst, whose tag
// it moves last: when there is an error, dst's tag names what it did before.
func Image(ctx context.Context, src, dst remote.Reference, opts Options) (*Result, error) {
	s, err := opts.shape()
	if err != nil {
		return nil, err
	}
	in, err := remote.Open(ctx, src, opts.Remote)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	c := &conversion{opts: opts, shape: s, src: in, srcRef: src, layers: map[v1.Hash]*layerTask{}, copies: map[v1.Hash]v1.Descriptor{}}
	if c.opts.Progress == nil {
		c.opts.Progress = new(Progress)
	}
	desc, raw, err := in.Root(ctx)
	if err != nil {
		return nil, err
	}
	root, err := c.plan(ctx, desc, raw, 0)
	if err != nil {
		return nil, err
	}
	ctx, c.stop = context.WithCancel(ctx)
	defer c.stop()
	if c.dst, err = openDest(ctx, dst, &opts); err != nil {
		return nil, fmt.Errorf("%v: %w", dst, err)
	}
	defer c.dst.close()
	defer c.closeKnown()

	if err := c.run(ctx); err != nil {
		return nil, err
	}
	out, outRaw, err := c.build(ctx, root)
	if err != nil {
		return nil, err
	}
	if err := c.finish(ctx, dst, out, outRaw); err != nil {
		return nil, err
	}
	c.pushPacks(ctx, root)
	return c.result(out), nil
}

// A conversion is one call of Image.
type conversion struct {
	opts   Options
	shape  shape
	src    remote.Source
	srcRef remote.Reference
	dst    dest
	stop   context.CancelFunc // ends what waits to be tried again

	manifests int                       // read so far
	layers    map[v1.Hash]*layerTask    // by source digest
	order     []*layerTask              // in the manifests' order
	copies    map[v1.Hash]v1.Descriptor // blobs that go over as they are

	once      sync.Once
	known     []known
	knownSrcs []remote.Source

	mu      sync.Mutex
	profile map[string]bool // names that were put first

	packs    []Pack
	warnings []string
}

// A node is a manifest or index of the source.
type node struct {
	desc     v1.Descriptor
	raw      []byte
	children []*node // of an index, one per entry; nil for those that are left out
	config   []byte  // of an image that is to be converted; nil for others, which go over as they are
	layers   []v1.Descriptor

	// Of what it became:
	out  v1.Descriptor
	lazy []v1.Descriptor // the layers of an image; config is the new one then
	pack *namedPack      // nil if its manifest names none that was made here
	has  bool            // its manifest names one
}

// plan reads the manifests below desc and notes what there is to do.
func (c *conversion) plan(ctx context.Context, desc v1.Descriptor, raw []byte, depth int) (*node, error) {
	if c.manifests++; c.manifests > maxManifests || depth > maxDepth {
		return nil, fmt.Errorf("index %v: more than %d manifests, or indexes nested more than %d deep", desc.Digest, maxManifests, maxDepth)
	}
	n := &node{desc: desc, raw: raw}
	if desc.MediaType.IsIndex() {
		return n, c.planIndex(ctx, n, depth)
	}
	img, err := remote.ReadImage(ctx, c.src, desc)
	if err != nil {
		return nil, err
	}
	m := img.Manifest
	if !isConfig(m.Config.MediaType) || !slices.ContainsFunc(m.Layers, func(l v1.Descriptor) bool { return isTar(l.MediaType) }) {
		c.copy(append([]v1.Descriptor{m.Config}, m.Layers...)...)
		return n, nil
	}
	if _, n.config, err = img.Config(ctx); err != nil {
		return nil, err
	}
	n.layers = m.Layers
	for _, l := range n.layers {
		if !isTar(l.MediaType) {
			c.copy(l)
		}
		if _, ok := c.layers[l.Digest]; !ok {
			t := &layerTask{desc: l}
			c.layers[l.Digest] = t
			c.order = append(c.order, t)
		}
	}
	return n, nil
}

func (c *conversion) planIndex(ctx context.Context, n *node, depth int) error {
	var index v1.IndexManifest
	if err := json.Unmarshal(n.raw, &index); err != nil {
		return fmt.Errorf("index %v: %w", n.desc.Digest, err)
	}
	n.children = make([]*node, len(index.Manifests))
	taken := map[string]bool{}
	add := func(i int) error {
		d := index.Manifests[i]
		raw, err := c.src.Manifest(ctx, d)
		if err != nil {
			return err
		}
		// An index may leave out what its entries are; the bytes say it.
		if !d.MediaType.IsIndex() && !d.MediaType.IsImage() {
			if d.MediaType, err = kindOf(raw); err != nil {
				return fmt.Errorf("manifest %v: %w", d.Digest, err)
			}
		}
		taken[d.Digest.String()] = true
		n.children[i], err = c.plan(ctx, d, raw, depth+1)
		return err
	}
	for i, d := range index.Manifests {
		if d.Annotations[attestationType] == "" && (d.MediaType.IsIndex() || c.wanted(d.Platform)) {
			if err := add(i); err != nil {
				return err
			}
		}
	}
	// Attestations go with the image they speak of.
	for i, d := range index.Manifests {
		if of := d.Annotations[attestationDigest]; d.Annotations[attestationType] != "" && (taken[of] || len(c.opts.Platforms) == 0) {
			if err := add(i); err != nil {
				return err
			}
		}
	}
	if depth == 0 && len(taken) == 0 {
		var there []string
		for _, d := range index.Manifests {
			if d.Platform != nil && d.Annotations[attestationType] == "" {
				there = append(there, d.Platform.String())
			}
		}
		return fmt.Errorf("index %v: no image for the platform: there is %s", n.desc.Digest, strings.Join(there, ", "))
	}
	return nil
}

func (c *conversion) wanted(p *v1.Platform) bool {
	if len(c.opts.Platforms) == 0 {
		return true
	}
	return p != nil && slices.ContainsFunc(c.opts.Platforms, func(want v1.Platform) bool { return p.Satisfies(want) })
}

func kindOf(raw []byte) (types.MediaType, error) {
	o, err := parseObject(raw)
	if err != nil {
		return "", err
	}
	if o["manifests"] != nil {
		return types.OCIImageIndex, nil
	}
	return types.OCIManifestSchema1, nil
}

func isConfig(t types.MediaType) bool { return t == types.OCIConfigJSON || t == types.DockerConfigJSON }

const dockerZstdLayer types.MediaType = "application/vnd.docker.image.rootfs.diff.tar.zstd"

// isTar reports whether a layer is a tar that may be changed. Layers that must not be
// distributed, and those that are encrypted or no tar, are not.
func isTar(t types.MediaType) bool {
	switch t {
	case types.OCILayer, types.OCIUncompressedLayer, types.OCILayerZStd,
		types.DockerLayer, types.DockerUncompressedLayer, dockerZstdLayer:
		return true
	}
	return false
}

// copy notes blobs that go over as they are.
func (c *conversion) copy(descs ...v1.Descriptor) {
	for _, d := range descs {
		if d.MediaType.IsDistributable() {
			c.copies[d.Digest] = d
		}
	}
}

// A layerTask is one layer to be converted.
type layerTask struct {
	desc    v1.Descriptor
	outcome Outcome
	to      v1.Descriptor // with the annotations to add
	diffID  v1.Hash       // zero: as it was
}

// run converts layers and copies blobs, until all are in DST.
func (c *conversion) run(ctx context.Context) error {
	workers := c.opts.Workers
	if workers <= 0 {
		workers = runtime.GOMAXPROCS(0)
	}
	pool := newPool(c.shape, workers)
	defer pool.close()
	p := c.opts.Progress
	for _, t := range c.order {
		p.plan(t.desc.Size)
	}
	// The first error is the one to tell; what it stops ends with errors of its own.
	var first error
	var once sync.Once
	fail := func(err error) error {
		once.Do(func() {
			first = err
			c.stop()
		})
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(sideBySide)
	for _, d := range c.copies {
		g.Go(func() error {
			if err := c.copyBlob(ctx, c.src, d, func(int) {}); err != nil {
				return fail(fmt.Errorf("blob %v: %w", d.Digest, err))
			}
			return nil
		})
	}
	for _, t := range c.order {
		g.Go(func() error {
			if err := c.layer(ctx, t, pool); err != nil {
				return fail(fmt.Errorf("layer %v: %w", t.desc.Digest, err))
			}
			p.layerDone()
			return nil
		})
	}
	g.Wait()
	return first
}

// layer brings one layer to DST in its lazy form.
func (c *conversion) layer(ctx context.Context, t *layerTask, pool *pool) error {
	p := c.opts.Progress
	read := &reading{p: p}
	defer func() { read.skip(t.desc.Size) }()
	if !isTar(t.desc.MediaType) {
		t.outcome, t.to = Passed, t.desc
		return nil
	}
	options := c.optionsString()
	_, err := toc.Promised(t.desc.Annotations)
	lazy, notes := err == nil, map[string]string(nil)
	if !lazy {
		if ok, err := c.reuse(ctx, t, options); ok || err != nil {
			return err
		}
		if notes, lazy, err = c.unpromised(ctx, t.desc); err != nil {
			return err
		}
	}
	if lazy {
		t.outcome, t.to = Kept, t.desc
		t.to.Annotations = notes
		return c.copyBlob(ctx, c.src, t.desc, read.add)
	}
	b, err := c.convertLayer(ctx, t.desc, pool, read.add)
	if err != nil {
		return err
	}
	defer b.Close()
	t.outcome = Converted
	t.to = v1.Descriptor{MediaType: c.mediaType(), Digest: b.digest, Size: b.size, Annotations: b.annotations}
	t.to.Annotations[sourceAnnotation] = t.desc.Digest.String()
	t.to.Annotations[optionsAnnotation] = options
	t.diffID = b.diffID
	p.writing(b.size)
	if err := c.dst.put(ctx, t.to, func() (io.ReadCloser, error) { return b.open(), nil }); err != nil {
		return err
	}
	c.remember(t, options)
	return nil
}

func (c *conversion) mediaType() types.MediaType {
	if c.shape.format == ZstdChunked {
		return types.OCILayerZStd
	}
	return types.OCILayer
}

// copyBlob brings a blob of from to DST as it is, checked against its digest on the way.
func (c *conversion) copyBlob(ctx context.Context, from remote.Source, d v1.Descriptor, read func(int)) error {
	place := ""
	if from == c.src && c.srcRef.Kind() == remote.Registry {
		place = c.srcRef.Name().Context().Name()
	}
	for _, p := range slices.Compact([]string{"", place}) {
		if ok, err := c.dst.has(ctx, d, p); ok || err != nil {
			return err
		}
	}
	return c.dst.put(ctx, d, func() (io.ReadCloser, error) {
		return newChecked(newSource(ctx, from.Blob(d), read), d), nil
	})
}

// unpromised reports whether a layer is lazy although its manifest does not say so, and returns the
// annotations that say it.
func (c *conversion) unpromised(ctx context.Context, d v1.Descriptor) (map[string]string, bool, error) {
	n := min(d.Size, toc.FooterSize)
	if n == 0 {
		return nil, false, nil
	}
	tail, err := c.readRange(ctx, d, d.Size-n, n)
	if errors.Is(err, remote.ErrNoRanges) {
		return nil, false, nil // converting reads from the beginning
	}
	if err != nil {
		return nil, false, err
	}
	loc, err := toc.ParseFooter(tail, d.Size)
	if err != nil {
		return nil, false, nil
	}
	notes, err := c.promise(ctx, d, loc)
	if err != nil {
		// It ends like a lazy layer and is none.
		return nil, false, ctx.Err()
	}
	return notes, true, nil
}

func (c *conversion) readRange(ctx context.Context, d v1.Descriptor, off, n int64) ([]byte, error) {
	rc, err := c.src.Blob(d).Range(ctx, off, n)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	b := make([]byte, n)
	_, err = io.ReadFull(rc, b)
	return b, err
}

func (c *conversion) result(root v1.Descriptor) *Result {
	r := &Result{Digest: root.Digest, MediaType: root.MediaType, Uploaded: c.dst.uploaded(), Layers: []Layer{}, Packs: c.packs, Warnings: c.warnings}
	for _, t := range c.order {
		r.Layers = append(r.Layers, Layer{t.desc.Digest, t.to.Digest, t.outcome, t.desc.Size, t.to.Size})
	}
	for _, name := range c.opts.Profile {
		if !c.profile[name] {
			r.Missed = append(r.Missed, name)
		}
	}
	return r
}
