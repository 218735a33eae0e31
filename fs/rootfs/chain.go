package rootfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/google/go-containerregistry/pkg/authn"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"lazuli/fs/fetch"
	"lazuli/fs/remote"
	"lazuli/fs/store"
	"lazuli/fs/toc"
)

// A Chain is some layers, the lowest first, as one tree. Its methods are what a snapshotter needs, whose layers come one by
// one and not as an image.
type Chain struct {
	n      *Node
	Layers []RecordLayer
}

// Chain returns the chain of layers that this node knows: from [Node.Layer] or [Node.Keep], now or in another process.
func (n *Node) Chain(layers []RecordLayer) Chain { return Chain{n, layers} }

// ID names the chain's metadata image.
func (c Chain) ID() string { return chain(c.parts()) }

func (c Chain) parts() []*layer {
	parts := make([]*layer, len(c.Layers))
	for i, l := range c.Layers {
		parts[i] = l.layer()
	}
	return parts
}

// Record returns the chain as it is written down beside a mount of it.
func (c Chain) Record() Record { return Record{Chain: c.ID(), Layers: c.Layers} }

// record returns what another process needs to go on with the layer, of an image that has its blob.
func (l *layer) record(ref remote.Reference) RecordLayer {
	r := RecordLayer{
		ID: l.id, Digest: l.Digest.String(), Size: l.Size, Lazy: l.why == nil, Compressed: l.promise.Compressed,
		Reference: ref.String(),
	}
	if l.diffID != (v1.Hash{}) {
		r.DiffID = l.diffID.String()
	}
	return r
}

var errOrdinary = fmt.Errorf("%w: it was not when it was first seen", toc.ErrNotLazy)

// layer is the way back from a record. The blob is not known yet.
func (r RecordLayer) layer() *layer {
	l := &layer{id: r.ID}
	l.Digest, _ = v1.NewHash(r.Digest) // the zero value for a layer that no registry has
	l.diffID, _ = v1.NewHash(r.DiffID)
	l.Size = r.Size
	if !r.Lazy {
		l.why = errOrdinary
		return l
	}
	d, err := toc.ParseDigest("sha256:" + r.ID[min(len("toc-"), len(r.ID)):])
	if err == nil {
		l.promise = toc.Promise{Digest: d, Compressed: r.Compressed}
	}
	return l
}

// Layer makes a lazy layer of an image known to the node: its table of contents is fetched, unless it is here, and
// verified. It returns that too, for [Chain.Build]. Of a layer that is not lazy the error wraps [toc.ErrNotLazy].
func (n *Node) Layer(ctx context.Context, rl remote.Layer, ref remote.Reference, diffID v1.Hash) (RecordLayer, *toc.TOC, error) {
	n.queue.Touch()
	l, err := newLayer(rl, diffID)
	if err != nil {
		return RecordLayer{}, nil, err
	}
	if l.why != nil {
		return RecordLayer{}, nil, fmt.Errorf("%s: %w", l.name(), l.why)
	}
	load := func() (any, error) {
		t, err := l.load(n)
		if err != nil {
			t, err = l.fetch(ctx, n)
		}
		if err == nil && !l.openTable(n) {
			err = l.makeTable(n, t)
		}
		return t, err
	}
	// Images that are pulled at the same time may have the layer in common.
	t, err, shared := n.building.Do(l.id, load)
	if err != nil && shared && ctx.Err() == nil { // the other image may be of another registry
		t, err = load()
	}
	return l.record(ref), t.(*toc.TOC), err
}

// Keep makes a layer known that was made here: t is [toc.Whole], and its files are in the store. The record has neither
// Digest nor Reference; the caller may add them if a registry has the same layer.
func (n *Node) Keep(t *toc.TOC) (RecordLayer, error) {
	l := &layer{id: "diff-" + hexOf(t.Digest.String()), why: errOrdinary}
	if !l.openTable(n) {
		if err := l.keepWhole(n, t); err != nil {
			return RecordLayer{}, err
		}
		if err := l.makeTable(n, t); err != nil {
			return RecordLayer{}, err
		}
	}
	var size int64
	for i := range t.Entries {
		size += t.Entries[i].Size
	}
	return RecordLayer{ID: l.id, Size: size}, nil
}

// Build makes the metadata image, if it is not here, from the layers' tables of contents: tocs, which are
// read from the store if it is nil.
func (c Chain) Build(tocs []*toc.TOC) (path string, err error) {
	parts := c.parts()
	id := chain(parts)
	path = c.n.store.Path("meta", id+".erofs")
	_, err, _ = c.n.building.Do(id, func() (any, error) {
		if _, err := os.Stat(path); err == nil {
			return nil, nil
		}
		if tocs == nil {
			tocs = make([]*toc.TOC, len(parts))
			for i, l := range parts {
				if tocs[i], err = l.load(c.n); err != nil {
					return nil, fmt.Errorf("%s: %w: remove the image and pull it again", l.id, err)
				}
			}
		}
		return nil, c.n.buildMeta(parts, tocs, path)
	})
	return path, err
}

// Mount makes the metadata image, if it is not here, mounts it, if it is not mounted, and returns where: at a folder
// of its own that all users of the chain share, until [Node.Sweep]. File systems that are stacked on it keep it whatever happens
// to that mount.
func (c Chain) Mount() (string, error) {
	path, err := c.Build(nil)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(c.n.root, "chains", c.ID())
	_, err, _ = c.n.building.Do(dir, func() (any, error) {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err != nil || st.Type == unix.EROFS_SUPER_MAGIC_V1 {
			return nil, err
		}
		return nil, mountEROFS(path, dir)
	})
	return dir, err
}

// Overlay says what is put on top of a [Chain].
type Overlay struct {
	// Upper and Work are the writable layer, on the file system of the root folder. "" for both is a read-only mount.
	Upper, Work string
	// New says that Upper is new: it gets the attributes of the chain's root.
	New bool
}

// Attach mounts the chain at dir, and makes its layers readable until the returned function is called. The mount stays. The
// caller has written down the chain's [Chain.Record] before, where [Node.Sweep] sees it.
func (c Chain) Attach(dir string, o Overlay) (release func(), err error) {
	server, err := c.n.serve()
	if err != nil {
		return nil, err
	}
	c.n.sweeping.RLock()
	defer c.n.sweeping.RUnlock()
	metaDir, err := c.Mount()
	if err != nil {
		return nil, err
	}
	if release, err = c.Use(); err != nil {
		return nil, err
	}
	if o.New && o.Upper != "" {
		err = likeRoot(o.Upper, metaDir)
	}
	if err == nil {
		err = mountOverlay(overlay{meta: metaDir, objects: c.n.store.Objects(), server: server, upper: o.Upper, work: o.Work, durable: true}, dir)
	}
	if err != nil {
		release()
		return nil, err
	}
	return release, nil
}

// A usedLayer is a layer in the queue, for all that are mounted with it.
type usedLayer struct {
	*fetch.Layer
	refs int
}

// Use makes the layers readable through the object server until the returned function is called.
func (c Chain) Use() (release func(), err error) {
	n := c.n
	var keys []string
	free := func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		for _, key := range keys {
			u := n.used[key]
			if u.refs--; u.refs == 0 {
				delete(n.used, key)
				n.queue.Remove(u.Layer)
			}
		}
	}
	for _, r := range c.Layers {
		if err := n.useLayer(r, &keys); err != nil {
			free()
			return nil, err
		}
	}
	var once sync.Once
	return func() { once.Do(free) }, nil
}

func (n *Node) useLayer(r RecordLayer, keys *[]string) error {
	l, key, err := n.openRecord(r)
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	u := n.used[key]
	if u == nil {
		if !l.openTable(n) {
			return fmt.Errorf("%s: its chunk table is not in the store: remove the image and pull it again", l.id)
		}
		u = &usedLayer{Layer: l.source(n, &MountOptions{})}
		if l.Blob == nil {
			u.Whole = func(context.Context) error {
				return errors.New("a file of a layer that was made on this node is not in the store any more: remove the image and pull it again")
			}
		}
		if err := n.queue.Add(u.Layer); err != nil {
			return err
		}
		n.used[key] = u
	}
	u.refs++
	*keys = append(*keys, key)
	return nil
}

// openRecord returns the layer with its blob, and a name for the two: images of several repositories may have
// the same layer.
func (n *Node) openRecord(r RecordLayer) (l *layer, key string, err error) {
	l = r.layer()
	key = l.id
	if r.Reference == "" {
		return l, key, nil
	}
	ref, err := remote.ParseReference(r.Reference)
	if err != nil {
		return nil, "", err
	}
	src, err := n.source(ref)
	if err != nil {
		return nil, "", err
	}
	l.Blob = src.Blob(l.Descriptor)
	return l, key + " " + repository(ref), nil
}

// repository names where a reference's blobs lie.
func repository(ref remote.Reference) string {
	if name := ref.Name(); name != nil {
		return name.Context().Name()
	}
	return ref.Path()
}

// source returns the one source of a repository, so that all its images share what a registry demanded and where it
// redirected to.
func (n *Node) source(ref remote.Reference) (remote.Source, error) {
	key := repository(ref)
	n.mu.Lock()
	defer n.mu.Unlock()
	if s := n.sources[key]; s != nil {
		return s, nil
	}
	s, err := remote.Open(context.Background(), ref, n.remoteOptions(nil)) // no I/O but for local files
	if err == nil {
		n.sources[key] = s
	}
	return s, err
}

// Image returns the image that ref names by its digest.
func (n *Node) Image(ctx context.Context, ref remote.Reference, digest v1.Hash) (*remote.Image, error) {
	n.queue.Touch() // a pull wants the link
	src, err := n.source(ref)
	if err != nil {
		return nil, err
	}
	return remote.ReadImage(ctx, src, v1.Descriptor{Digest: digest, Size: -1})
}

func (n *Node) remoteOptions(keychain authn.Keychain) remote.Options {
	if keychain == nil {
		keychain = n.o.Keychain
	}
	return remote.Options{Keychain: keychain, Hosts: n.o.Hosts, Logger: n.log}
}

// Here returns how much of a layer is in the store: files, each content once, and their bytes.
func (n *Node) Here(r RecordLayer) (objects, bytes int64, err error) {
	err = n.objectsOf(r.ID, func(key store.Key, size int64) bool {
		if here := n.store.Here(key, size); here > 0 {
			objects++
			bytes += here
		}
		return true
	})
	return objects, bytes, err
}

// Complete reports whether everything of a layer that is in use is in the store.
func (n *Node) Complete(r RecordLayer) bool {
	_, key, err := n.openRecord(r)
	if err != nil {
		return false
	}
	n.mu.Lock()
	u := n.used[key]
	n.mu.Unlock()
	return u != nil && n.queue.Complete(u.Layer)
}

// Tagged returns the image that ref's tag names now.
func (n *Node) Tagged(ctx context.Context, ref remote.Reference) (*remote.Image, error) {
	src, err := remote.Open(ctx, ref, n.remoteOptions(nil)) // a source gives one answer for its lifetime: not the shared one
	if err != nil {
		return nil, err
	}
	return remote.Pick(ctx, src, nil)
}

// Known makes sure that what [Node.Layer] keeps of a layer is in the store: it is fetched again if it was removed.
func (n *Node) Known(ctx context.Context, r RecordLayer) error {
	l, _, err := n.openRecord(r)
	if err != nil {
		return err
	}
	if l.openTable(n) {
		if _, err := os.Stat(n.store.Path("layers", l.id, "toc")); err == nil {
			return nil
		}
	}
	t, err := l.fetch(ctx, n)
	if err != nil {
		return err
	}
	return l.makeTable(n, t)
}

// ClaimedDiffID returns what the config of the layer's image says that its diffID is. The error is an [*ErrDiffID] if it says
// more than one thing.
func (n *Node) ClaimedDiffID(ctx context.Context, r RecordLayer) (string, error) {
	ref, err := remote.ParseReference(r.Reference)
	if err != nil {
		return "", err
	}
	src, err := remote.Open(ctx, ref, n.remoteOptions(nil))
	if err != nil {
		return "", err
	}
	defer src.Close()
	image, err := remote.Pick(ctx, src, nil)
	if err != nil {
		return "", err
	}
	config, _, err := image.Config(ctx)
	if err != nil {
		return "", err
	}
	claimed := ""
	for i, l := range image.Layers {
		if l.Digest.String() != r.Digest || i >= len(config.RootFS.DiffIDs) {
			continue
		}
		d := config.RootFS.DiffIDs[i].String()
		if claimed != "" && claimed != d {
			return "", &ErrDiffID{Layer: r.Digest, Claimed: claimed + " and the diffID " + d, Is: "one only"}
		}
		claimed = d
	}
	if claimed == "" {
		return "", fmt.Errorf("%s has no layer %s", r.Reference, r.Digest)
	}
	return claimed, nil
}

// Chunks returns a function that returns the chunks of an object that one of the chain's layers has. Where they lie in a
// blob is left out. It may be called from several goroutines.
func (c Chain) Chunks() func(key toc.Digest) ([]toc.Chunk, bool) {
	tables := sync.OnceValue(func() (list []*toc.Table) {
		for _, r := range c.Layers {
			if t, err := toc.OpenTable(c.n.store.Path("layers", r.ID, "table")); err == nil {
				list = append(list, t)
			}
		}
		return list
	})
	return func(key toc.Digest) ([]toc.Chunk, bool) {
		for _, table := range tables() {
			o, ok := table.Find(key)
			if !ok {
				continue
			}
			chunks := make([]toc.Chunk, o.NumChunks())
			for i := range chunks {
				chunks[i], _ = o.Chunk(i)
				chunks[i].Member, chunks[i].Inner = 0, 0
			}
			return chunks, true
		}
		return nil, false
	}
}
