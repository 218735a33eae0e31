package snapshotter

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sync/errgroup"

	"lazuli/fs/remote"
	"lazuli/fs/rootfs"
	"lazuli/fs/toc"
)

// What containerd, nerdctl and stargz-snapshotter's clients say of a layer when they ask to prepare it.
const (
	labelRef      = "containerd.io/snapshot/cri.image-ref"
	labelManifest = "containerd.io/snapshot/cri.manifest-digest"
	labelLayer    = "containerd.io/snapshot/cri.layer-digest"
	labelLayers   = "containerd.io/snapshot/cri.image-layers" // this one and those above, as many as fit into a label
	labelDiffID   = "containerd.io/snapshot/diff-id"

	labelStargzRef    = "containerd.io/snapshot/remote/stargz.reference"
	labelStargzLayer  = "containerd.io/snapshot/remote/stargz.digest"
	labelStargzLayers = "containerd.io/snapshot/remote/stargz.layers"
)

// A request is what the labels of a Prepare say about a layer.
type request struct {
	ref      remote.Reference
	manifest v1.Hash // zero if no label says it
	layer    v1.Hash
	diffID   v1.Hash // zero if no label says it
	toc      string  // the TOC's digest as an annotation of the layer has it, or ""
	target   string  // what containerd calls the chain up to this layer
	top      bool    // no layer is above
}

// parseRequest returns what the labels say, and false if they do not say enough: then the layer is unpacked as usual.
func parseRequest(target string, labels map[string]string) (q request, ok bool) {
	var err error
	if q.ref, err = remote.ParseReference(cmp.Or(labels[labelRef], labels[labelStargzRef])); err != nil {
		return q, false
	}
	if q.layer, err = v1.NewHash(cmp.Or(labels[labelLayer], labels[labelStargzLayer])); err != nil {
		return q, false
	}
	q.manifest, _ = v1.NewHash(labels[labelManifest])
	q.diffID, _ = v1.NewHash(labels[labelDiffID])
	q.toc = labels[toc.DigestAnnotation]
	q.target = target
	q.top = cmp.Or(labels[labelLayers], labels[labelStargzLayers]) == q.layer.String()
	return q, q.ref.Kind() == remote.Registry
}

// A pull is one image whose layers containerd is asking for, one after the other. All of them are resolved at the
// first question.
type pull struct {
	done   chan struct{} // closed when image or err is set
	image  *remote.Image
	err    error
	layers []*pulledLayer // of image, the lowest first
	// release gives back the layers, which the fetcher knows until a container has had the time to be started: it remembers of them what a
	// startup pack brought. It is nil if there is nothing to give back.
	release func()

	// Under pulls.mu, when the startup pack is being fetched:
	chain string // of the layers
	stop  func() // gives the pack up

	finished chan struct{} // closed when all is done
}

type pulledLayer struct {
	done   chan struct{} // closed when the rest is set
	digest v1.Hash
	record rootfs.RecordLayer
	toc    *toc.TOC
	err    error // wraps toc.ErrNotLazy if the layer is not
}

const (
	// pullTimeout bounds what is done for a pull that nobody may be waiting for any more.
	pullTimeout = 10 * time.Minute
	// pullKept is for how long the answers stay known: containerd asks for one layer after the other.
	pullKept = time.Minute
	// sideBySide is how many tables of contents are fetched at once: more than most images have layers.
	sideBySide = 32
)

// A pulls has the pulls of the last minute.
type pulls struct {
	mu sync.Mutex
	m  map[string]*pull
}

// removed gives up the startup packs of a chain, whose image has been removed.
func (p *pulls) removed(chain string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, x := range p.m {
		if x.stop != nil && x.chain == chain {
			x.stop()
		}
	}
}

// pull returns the pull of an image, which it begins if there is none.
func (s *Snapshotter) pull(q request) *pull {
	key := q.ref.String() + " " + q.manifest.String()
	s.pulls.mu.Lock()
	defer s.pulls.mu.Unlock()
	if p := s.pulls.m[key]; p != nil {
		return p
	}
	p := &pull{done: make(chan struct{}), finished: make(chan struct{})}
	if s.pulls.m == nil {
		s.pulls.m = map[string]*pull{}
	}
	s.pulls.m[key] = p
	forget := func() {
		s.pulls.mu.Lock()
		defer s.pulls.mu.Unlock()
		if s.pulls.m[key] == p {
			delete(s.pulls.m, key)
		}
	}
	s.work.Go(func() {
		ctx, cancel := context.WithTimeoutCause(s.ctx, pullTimeout, fmt.Errorf("not within %v", pullTimeout))
		defer cancel()
		defer close(p.finished)
		if err := s.resolve(ctx, p, q); err != nil {
			forget() // nothing caches an error
			return
		}
		time.AfterFunc(pullKept, func() {
			forget()
			if p.release != nil {
				p.release()
			}
		})
	})
	return p
}

// resolve gets the image's manifest and then the tables of contents of all layers side by side, and makes the metadata
// image if all are lazy. It returns an error if anything could not be had.
func (s *Snapshotter) resolve(ctx context.Context, p *pull, q request) error {
	var startup *rootfs.Startup // begins as soon as the image's digest is known
	image := func(ctx context.Context) (*remote.Image, error) {
		select {
		case <-p.done:
			return p.image, p.err
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	if q.manifest != (v1.Hash{}) {
		startup = s.node.Startup(q.ref, q.manifest, image)
	}
	p.image, p.err = s.image(ctx, q)
	if startup == nil && p.err == nil {
		startup = s.node.Startup(q.ref, p.image.Digest, image)
	}
	if startup != nil {
		defer startup.Close()
	}
	if p.err == nil {
		startup.Image(p.image)
		for _, l := range p.image.Layers {
			p.layers = append(p.layers, &pulledLayer{done: make(chan struct{}), digest: l.Digest})
		}
	}
	close(p.done)
	if p.err != nil {
		return p.err
	}
	ref := q.ref.At(p.image.Digest)
	var group errgroup.Group
	group.SetLimit(sideBySide)
	for i, l := range p.image.Layers {
		x := p.layers[i]
		group.Go(func() error {
			defer close(x.done)
			x.record, x.toc, x.err = s.node.Layer(ctx, l, ref, v1.Hash{})
			if errors.Is(x.err, toc.ErrNotLazy) {
				return nil
			}
			return x.err
		})
	}
	err := group.Wait()
	records, tocs := make([]rootfs.RecordLayer, len(p.layers)), make([]*toc.TOC, len(p.layers))
	whole := err == nil
	for i, x := range p.layers {
		records[i], tocs[i] = x.record, x.toc
		whole = whole && x.err == nil
		x.toc = nil // large
	}
	if whole && len(records) > 0 {
		// Somebody is going to start it. An error is for who does: it is made again then.
		chain := s.node.Chain(records)
		group.Go(func() error {
			if _, err := chain.Build(tocs); err != nil {
				s.log.Warn("metadata image", "image", q.ref.String(), "err", err)
			}
			return nil
		})
		if p.release, err = chain.Use(); err == nil {
			ctx, stop := context.WithCancel(ctx)
			defer stop()
			s.pulls.mu.Lock()
			p.chain, p.stop = chain.ID(), stop
			s.pulls.mu.Unlock()
			if err := chain.Start(ctx, startup, tocs); err != nil && ctx.Err() == nil {
				s.log.Warn("the startup pack was not of use", "image", q.ref.String(), "err", err)
			}
		}
		group.Wait()
	}
	return err
}

// image returns the image that the labels mean: the manifest that they name, or else what the tag is now.
func (s *Snapshotter) image(ctx context.Context, q request) (*remote.Image, error) {
	if q.manifest != (v1.Hash{}) {
		return s.node.Image(ctx, q.ref, q.manifest)
	}
	return s.node.Tagged(ctx, q.ref)
}

// lazy returns the record of the layer that a request is about. The error wraps toc.ErrNotLazy if
// it is not lazy.
func (s *Snapshotter) lazy(ctx context.Context, q request) (rootfs.RecordLayer, *pull, error) {
	p := s.pull(q)
	select {
	case <-p.done:
	case <-ctx.Done():
		return rootfs.RecordLayer{}, nil, context.Cause(ctx)
	}
	if p.err != nil {
		return rootfs.RecordLayer{}, nil, p.err
	}
	i := slices.IndexFunc(p.layers, func(l *pulledLayer) bool { return l.digest == q.layer })
	if i < 0 {
		return rootfs.RecordLayer{}, nil, fmt.Errorf("%v has no layer %v any more", q.ref, q.layer)
	}
	l := p.layers[i]
	select {
	case <-l.done:
	case <-ctx.Done():
		return rootfs.RecordLayer{}, nil, context.Cause(ctx)
	}
	if l.err != nil {
		return rootfs.RecordLayer{}, nil, l.err
	}
	if q.toc != "" && l.record.ID != "toc-"+strings.TrimPrefix(q.toc, "sha256:") {
		return rootfs.RecordLayer{}, nil, fmt.Errorf("layer %v: the manifest of %v names another table of contents than the label", q.layer, q.ref)
	}
	r := l.record
	r.DiffID = ""
	if q.diffID != (v1.Hash{}) {
		r.DiffID = q.diffID.String()
	}
	return r, p, nil
}

// whole returns the records of all layers of the image, the lowest first, if all are lazy.
func (p *pull) whole(ctx context.Context) ([]rootfs.RecordLayer, bool) {
	var list []rootfs.RecordLayer
	for _, l := range p.layers {
		select {
		case <-l.done:
		case <-ctx.Done():
			return nil, false
		}
		if l.err != nil {
			return nil, false
		}
		list = append(list, l.record)
	}
	return list, true
}
