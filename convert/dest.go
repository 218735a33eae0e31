package convert

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	ggcr "github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"lazuli/fs/remote"
)

// A dest is where the result goes. Until finish nothing in it has a tag. All
// methods but finish and close may be called concurrently.
type dest interface {
	// place names it in records: two conversions to one place share their blobs.
	place() string
	// has reports whether the blob is there. If it is not, but is at from, another place, has may bring it
	// here, when that costs no transfer.
	has(ctx context.Context, desc v1.Descriptor, from string) (bool, error)
	// put brings a blob here, unless it is there.
	put(ctx context.Context, desc v1.Descriptor, open func() (io.ReadCloser, error)) error
	// putManifest brings a manifest here that has no tag. What it names is there.
	putManifest(ctx context.Context, desc v1.Descriptor, raw []byte) error
	// blob returns a blob that is here.
	blob(ctx context.Context, desc v1.Descriptor) (remote.Blob, error)
	// finish brings the root here and gives it its tag.
	finish(ctx context.Context, desc v1.Descriptor, raw []byte) error
	// others returns references of images at the same place that may have layers in common, the likeliest first.
	others(ctx context.Context) []string
	// uploaded is how many bytes were brought here, manifests included.
	uploaded() int64
	// close lets go of what finish did not make permanent.
	close()
}

func openDest(ctx context.Context, ref remote.Reference, opts *Options) (dest, error) {
	switch ref.Kind() {
	case remote.Registry:
		if _, ok := ref.Name().(name.Digest); ok {
			return nil, errors.New("a digest cannot be pushed to: give a tag")
		}
		return newRegistryDest(ctx, ref, opts)
	case remote.Layout:
		return newLayoutDest(ref)
	case remote.Archive:
		return newArchiveDest(ref)
	}
	return nil, errors.New("no place for the result was named")
}

// counter counts bytes.
type counter struct {
	mu sync.Mutex
	n  int64
}

func (c *counter) add(n int64) {
	c.mu.Lock()
	c.n += n
	c.mu.Unlock()
}

func (c *counter) uploaded() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n
}

// A registryDest is a repository of a registry.
type registryDest struct {
	counter
	ref     name.Reference
	push    *ggcr.Pusher
	pull    *ggcr.Puller
	exists  sync.Map // digests of blobs that are known to be there
	options []ggcr.Option
	source  func() (remote.Source, error) // for reading, opened once
	opened  atomic.Bool
}

func newRegistryDest(ctx context.Context, ref remote.Reference, opts *Options) (*registryDest, error) {
	n := ref.Name()
	if opts.Remote.PlainHTTP {
		var err error
		if n, err = name.ParseReference(ref.String(), name.Insecure); err != nil {
			return nil, err
		}
	}
	keys := opts.Remote.Keychain
	if keys == nil {
		keys = authn.DefaultKeychain
	}
	o := []ggcr.Option{ggcr.WithAuthFromKeychain(keys), ggcr.WithUserAgent("lazuli"),
		ggcr.WithRetryPredicate(func(err error) bool { return ctx.Err() == nil && mayPass(err) })}
	if opts.Remote.Transport != nil {
		o = append(o, ggcr.WithTransport(opts.Remote.Transport))
	}
	d := &registryDest{ref: n, options: slices.Clip(o)}
	d.source = sync.OnceValues(func() (remote.Source, error) {
		d.opened.Store(true)
		return remote.Open(ctx, ref, opts.Remote)
	})
	var err error
	if d.push, err = ggcr.NewPusher(o...); err != nil {
		return nil, err
	}
	if d.pull, err = ggcr.NewPuller(o...); err != nil {
		return nil, err
	}
	return d, nil
}

// mayPass reports whether what failed may succeed when it is tried again.
func mayPass(err error) bool {
	var t interface{ Temporary() bool }
	return errors.As(err, &t) && t.Temporary() || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.ECONNREFUSED)
}

func (d *registryDest) place() string { return d.ref.Context().Name() }

func (d *registryDest) has(ctx context.Context, desc v1.Descriptor, from string) (bool, error) {
	if _, ok := d.exists.Load(desc.Digest); ok {
		return true, nil
	}
	if from != "" && from != d.place() {
		repo, err := name.NewRepository(from)
		if err != nil || repo.RegistryStr() != d.ref.Context().RegistryStr() {
			return false, nil
		}
		// An upload that has no bytes is there already, is mounted, or fails.
		l := &ggcr.MountableLayer{
			Layer:     &layer{desc: desc, open: func() (io.ReadCloser, error) { return nil, errNotMounted }},
			Reference: repo.Digest(desc.Digest.String()),
		}
		// Not through d.push, which remembers failures.
		if err := ggcr.WriteLayer(d.ref.Context(), l, append(d.options, ggcr.WithContext(ctx))...); err != nil {
			return false, ctx.Err()
		}
		d.exists.Store(desc.Digest, true)
		return true, nil
	}
	l, err := d.pull.Layer(ctx, d.ref.Context().Digest(desc.Digest.String()))
	if err != nil {
		return false, err
	}
	there, err := l.(interface{ Exists() (bool, error) }).Exists()
	if err != nil {
		var terr *transport.Error
		// Registries answer differently about repositories that are not there yet.
		if errors.As(err, &terr) && terr.StatusCode < http.StatusInternalServerError {
			return false, nil
		}
		return false, err
	}
	if there {
		d.exists.Store(desc.Digest, true)
	}
	return there, nil
}

var errNotMounted = errors.New("not mounted")

func (d *registryDest) put(ctx context.Context, desc v1.Descriptor, open func() (io.ReadCloser, error)) error {
	if _, ok := d.exists.Load(desc.Digest); ok {
		return nil
	}
	return d.push.Upload(ctx, d.ref.Context(), &layer{desc: desc, open: func() (io.ReadCloser, error) {
		rc, err := open()
		if err != nil {
			return nil, err
		}
		return &countingReader{rc, &d.counter}, nil
	}})
}

func (d *registryDest) putManifest(ctx context.Context, desc v1.Descriptor, raw []byte) error {
	return d.manifest(ctx, d.ref.Context().Digest(desc.Digest.String()), desc, raw)
}

func (d *registryDest) finish(ctx context.Context, desc v1.Descriptor, raw []byte) error {
	return d.manifest(ctx, d.ref, desc, raw)
}

func (d *registryDest) manifest(ctx context.Context, ref name.Reference, desc v1.Descriptor, raw []byte) error {
	if have, err := d.pull.Head(ctx, ref); err == nil && have.Digest == desc.Digest {
		return nil
	}
	if err := d.push.Put(ctx, ref, manifest{raw, desc.MediaType}); err != nil {
		return err
	}
	d.add(int64(len(raw)))
	return nil
}

// others lists a few tags of the first page, which has a thousand or so. Registries list in the order of
// names; of versions the last are the newest more often than not.
func (d *registryDest) others(ctx context.Context) []string {
	refs := []string{d.ref.Name()}
	lister, err := d.pull.Lister(ctx, d.ref.Context())
	if err != nil {
		return nil // a new repository, or one that does not list
	}
	page, err := lister.Next(ctx)
	if err != nil {
		return refs
	}
	tags := slices.Clone(page.Tags)
	slices.Reverse(tags)
	for _, t := range tags {
		if len(refs) > maxOthers {
			break
		}
		if t != d.ref.Identifier() {
			refs = append(refs, d.ref.Context().Tag(t).Name())
		}
	}
	return refs
}

func (d *registryDest) blob(_ context.Context, desc v1.Descriptor) (remote.Blob, error) {
	src, err := d.source()
	if err != nil {
		return nil, err
	}
	return src.Blob(desc), nil
}

func (d *registryDest) close() {
	if !d.opened.Load() {
		return
	}
	if src, err := d.source(); err == nil {
		src.Close()
	}
}

// layer is a blob as go-containerregistry wants it.
type layer struct {
	desc v1.Descriptor
	open func() (io.ReadCloser, error)
}

func (l *layer) Digest() (v1.Hash, error)             { return l.desc.Digest, nil }
func (l *layer) DiffID() (v1.Hash, error)             { return v1.Hash{}, errors.New("not asked for") }
func (l *layer) Compressed() (io.ReadCloser, error)   { return l.open() }
func (l *layer) Uncompressed() (io.ReadCloser, error) { return nil, errors.New("not asked for") }
func (l *layer) Size() (int64, error)                 { return l.desc.Size, nil }
func (l *layer) MediaType() (types.MediaType, error)  { return l.desc.MediaType, nil }

// manifest is a manifest as go-containerregistry wants it.
type manifest struct {
	raw []byte
	typ types.MediaType
}

func (m manifest) RawManifest() ([]byte, error)        { return m.raw, nil }
func (m manifest) MediaType() (types.MediaType, error) { return m.typ, nil }

type countingReader struct {
	io.ReadCloser
	c *counter
}

func (r *countingReader) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	r.c.add(int64(n))
	return n, err
}

// A layoutDest is an OCI image layout, which may hold other images and be read meanwhile.
type layoutDest struct {
	counter
	dir, tag string
	made     bool // the directory was not there
}

func newLayoutDest(ref remote.Reference) (*layoutDest, error) {
	if strings.Contains(ref.String(), "@sha256:") {
		return nil, errors.New("a digest cannot be written to: give a tag")
	}
	dir, err := filepath.Abs(ref.Path())
	if err != nil {
		return nil, err
	}
	d := &layoutDest{dir: dir, tag: ref.Tag()}
	if d.tag == "" {
		d.tag = "latest"
	}
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		d.made = true
	}
	if err := os.MkdirAll(filepath.Join(dir, "blobs", "sha256"), 0o755); err != nil {
		return nil, err
	}
	return d, nil
}

func (d *layoutDest) place() string { return "oci:" + d.dir }

func (d *layoutDest) path(h v1.Hash) string { return filepath.Join(d.dir, "blobs", h.Algorithm, h.Hex) }

func (d *layoutDest) has(_ context.Context, desc v1.Descriptor, from string) (bool, error) {
	st, err := os.Stat(d.path(desc.Digest))
	if err == nil {
		return st.Size() == desc.Size, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	return false, nil
}

func (d *layoutDest) put(ctx context.Context, desc v1.Descriptor, open func() (io.ReadCloser, error)) error {
	if ok, err := d.has(ctx, desc, ""); ok || err != nil {
		return err
	}
	in, err := open()
	if err != nil {
		return err
	}
	defer in.Close()
	if err := atomically(d.path(desc.Digest), func(w io.Writer) error {
		n, err := io.Copy(w, in)
		if err == nil && n != desc.Size {
			err = fmt.Errorf("%d bytes, want %d", n, desc.Size)
		}
		return err
	}); err != nil {
		return err
	}
	d.add(desc.Size)
	return nil
}

func (d *layoutDest) blob(_ context.Context, desc v1.Descriptor) (remote.Blob, error) {
	return fileBlob{desc.Size, func() (io.ReaderAt, func() error, error) {
		f, err := os.Open(d.path(desc.Digest))
		if err != nil {
			return nil, nil, err
		}
		return f, f.Close, nil
	}}, nil
}

// A fileBlob is a blob in a file.
type fileBlob struct {
	size int64
	open func() (io.ReaderAt, func() error, error)
}

func (b fileBlob) Size() int64 { return b.size }

func (b fileBlob) Range(_ context.Context, off, n int64) (io.ReadCloser, error) {
	if off < 0 || n < 0 || off > b.size || n > b.size-off {
		return nil, fmt.Errorf("no range of %d bytes at %d in %d bytes", n, off, b.size)
	}
	r, end, err := b.open()
	if err != nil {
		return nil, err
	}
	return fileRange{io.NewSectionReader(r, off, n), end}, nil
}

type fileRange struct {
	io.Reader
	end func() error
}

func (r fileRange) Close() error { return r.end() }

func (d *layoutDest) putManifest(ctx context.Context, desc v1.Descriptor, raw []byte) error {
	return d.put(ctx, desc, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(raw)), nil })
}

func (d *layoutDest) finish(ctx context.Context, desc v1.Descriptor, raw []byte) error {
	if err := d.putManifest(ctx, desc, raw); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(d.dir, "oci-layout")); errors.Is(err, fs.ErrNotExist) {
		if err := atomically(filepath.Join(d.dir, "oci-layout"), func(w io.Writer) error {
			_, err := io.WriteString(w, layoutVersion)
			return err
		}); err != nil {
			return err
		}
	}
	name := filepath.Join(d.dir, "index.json")
	old, err := os.ReadFile(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	index, err := tagged(old, desc, d.tag)
	if err != nil {
		return fmt.Errorf("index.json: %w", err)
	}
	d.made = false
	if bytes.Equal(index, old) {
		return nil
	}
	return atomically(name, func(w io.Writer) error {
		_, err := w.Write(index)
		return err
	})
}

func (d *layoutDest) others(context.Context) []string {
	raw, err := os.ReadFile(filepath.Join(d.dir, "index.json"))
	if err != nil {
		return nil
	}
	var index v1.IndexManifest
	if json.Unmarshal(raw, &index) != nil {
		return nil
	}
	var refs []string
	for _, m := range index.Manifests {
		ref := fmt.Sprintf("oci:%s@%v", d.dir, m.Digest)
		if m.Annotations[refName] == d.tag {
			refs = slices.Insert(refs, 0, ref)
		} else {
			refs = append(refs, ref)
		}
	}
	return refs[:min(len(refs), maxOthers+1)]
}

func (d *layoutDest) close() {
	if d.made {
		// Nobody else can have put anything here that an index.json names.
		os.RemoveAll(d.dir)
	}
}

const (
	layoutVersion = `{"imageLayoutVersion":"1.0.0"}`
	refName       = "org.opencontainers.image.ref.name"
	imageName     = "io.containerd.image.name"
)

// tagged returns the index.json that is old with tag meaning desc.
func tagged(old []byte, desc v1.Descriptor, tag string) ([]byte, error) {
	index := object{}
	if len(old) > 0 {
		if err := json.Unmarshal(old, &index); err != nil {
			return nil, err
		}
	}
	var list []object
	if raw, ok := index["manifests"]; ok {
		if err := json.Unmarshal(raw, &list); err != nil {
			return nil, err
		}
	}
	entry := object{}
	entry.set("mediaType", desc.MediaType)
	entry.set("digest", desc.Digest)
	entry.set("size", desc.Size)
	notes := map[string]string{refName: tag}
	if strings.ContainsAny(tag, "/:") {
		notes[imageName] = tag
	}
	entry.set("annotations", notes)
	at := slices.IndexFunc(list, func(o object) bool {
		var have map[string]string
		return json.Unmarshal(o["annotations"], &have) == nil && have[refName] == tag
	})
	if at >= 0 {
		var have v1.Hash
		if json.Unmarshal(list[at]["digest"], &have) == nil && have == desc.Digest {
			return old, nil
		}
		list[at] = entry
	} else {
		list = append(list, entry)
	}
	index.set("schemaVersion", 2)
	index.set("mediaType", types.OCIImageIndex)
	index.set("manifests", list)
	return index.bytes()
}

// atomically writes a file that is there as a whole or not at all.
func atomically(name string, write func(io.Writer) error) error {
	f, err := os.CreateTemp(filepath.Dir(name), ".lazuli-*")
	if err != nil {
		return err
	}
	err = write(f)
	if err == nil {
		err = f.Chmod(0o644)
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

// An archiveDest is a tar file that is an OCI image layout and has docker's manifest.json beside it, so that
// docker load and podman read it and nothing is lost for those who know layouts.
type archiveDest struct {
	counter
	path, tag string
	mu        sync.Mutex
	f         *os.File
	tar       *tar.Writer
	there     map[v1.Hash]int64  // offsets in f
	small     map[v1.Hash][]byte // manifests and configs, for manifest.json
}

func newArchiveDest(ref remote.Reference) (*archiveDest, error) {
	if strings.Contains(ref.String(), "@sha256:") {
		return nil, errors.New("a digest cannot be written to: give a tag")
	}
	path, err := filepath.Abs(ref.Path())
	if err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".lazuli-*")
	if err != nil {
		return nil, err
	}
	d := &archiveDest{path: path, tag: ref.Tag(), f: f, tar: tar.NewWriter(f), there: map[v1.Hash]int64{}, small: map[v1.Hash][]byte{}}
	if d.tag == "" {
		d.tag = "latest"
	}
	return d, nil
}

func (d *archiveDest) place() string { return "docker-archive:" + d.path }

func (d *archiveDest) has(_ context.Context, desc v1.Descriptor, _ string) (bool, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, ok := d.there[desc.Digest]
	return ok, nil
}

func (d *archiveDest) put(_ context.Context, desc v1.Descriptor, open func() (io.ReadCloser, error)) error {
	in, err := open()
	if err != nil {
		return err
	}
	defer in.Close()
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, ok := d.there[desc.Digest]; ok {
		return nil
	}
	var r io.Reader = in
	if desc.MediaType.IsConfig() || desc.MediaType.IsImage() || desc.MediaType.IsIndex() {
		b, err := io.ReadAll(io.LimitReader(in, desc.Size+1))
		if err != nil {
			return err
		}
		d.small[desc.Digest] = b
		r = bytes.NewReader(b)
	}
	at, err := d.write("blobs/"+desc.Digest.Algorithm+"/"+desc.Digest.Hex, desc.Size, r)
	if err == nil {
		d.there[desc.Digest] = at
	}
	return err
}

// write returns where in the file the content begins.
func (d *archiveDest) write(name string, size int64, r io.Reader) (int64, error) {
	// The same input gives the same archive: no times, no owners.
	if err := d.tar.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o644, ModTime: time.Unix(0, 0)}); err != nil {
		return 0, err
	}
	at, err := d.f.Seek(0, io.SeekCurrent)
	if err != nil {
		return 0, err
	}
	n, err := io.Copy(d.tar, r)
	if err == nil && n != size {
		err = fmt.Errorf("%d bytes, want %d", n, size)
	}
	d.add(n)
	return at, err
}

func (d *archiveDest) blob(_ context.Context, desc v1.Descriptor) (remote.Blob, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	at, ok := d.there[desc.Digest]
	if !ok {
		return nil, fmt.Errorf("blob %v is not in the archive", desc.Digest)
	}
	return fileBlob{desc.Size, func() (io.ReaderAt, func() error, error) {
		return io.NewSectionReader(d.f, at, desc.Size), func() error { return nil }, nil
	}}, nil
}

func (d *archiveDest) putManifest(ctx context.Context, desc v1.Descriptor, raw []byte) error {
	return d.put(ctx, desc, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(raw)), nil })
}

func (d *archiveDest) finish(ctx context.Context, desc v1.Descriptor, raw []byte) error {
	if err := d.putManifest(ctx, desc, raw); err != nil {
		return err
	}
	index, err := tagged(nil, desc, d.tag)
	if err != nil {
		return err
	}
	old, err := d.dockerManifest(desc)
	if err != nil {
		return err
	}
	for _, f := range []struct {
		name string
		data []byte
	}{{"oci-layout", []byte(layoutVersion)}, {"index.json", index}, {"manifest.json", old}} {
		if f.data == nil {
			continue
		}
		if _, err := d.write(f.name, int64(len(f.data)), bytes.NewReader(f.data)); err != nil {
			return err
		}
	}
	if err := d.tar.Close(); err != nil {
		return err
	}
	if err := d.f.Chmod(0o644); err != nil {
		return err
	}
	if err := d.f.Close(); err != nil {
		return err
	}
	if err := os.Rename(d.f.Name(), d.path); err != nil {
		return err
	}
	d.f = nil
	return nil
}

// dockerManifest returns docker's manifest.json for the image in desc that this machine can run, or the
// first one. An index has no place in that file. The result is nil if there is no image.
func (d *archiveDest) dockerManifest(desc v1.Descriptor) ([]byte, error) {
	for depth := 0; desc.MediaType.IsIndex(); depth++ {
		var index v1.IndexManifest
		if err := json.Unmarshal(d.small[desc.Digest], &index); err != nil {
			return nil, err
		}
		images := slices.DeleteFunc(index.Manifests, func(m v1.Descriptor) bool {
			return m.Annotations[attestationType] != "" || d.small[m.Digest] == nil
		})
		if len(images) == 0 || depth == maxDepth {
			return nil, nil
		}
		at := slices.IndexFunc(images, func(m v1.Descriptor) bool {
			return m.Platform != nil && m.Platform.OS == "linux" && m.Platform.Architecture == runtime.GOARCH
		})
		desc = images[max(at, 0)]
	}
	var m v1.Manifest
	if err := json.Unmarshal(d.small[desc.Digest], &m); err != nil {
		return nil, err
	}
	blob := func(h v1.Hash) string { return "blobs/" + h.Algorithm + "/" + h.Hex }
	entry := struct {
		Config   string
		RepoTags []string
		Layers   []string
	}{Config: blob(m.Config.Digest), Layers: []string{}}
	if strings.ContainsAny(d.tag, "/:") {
		entry.RepoTags = []string{d.tag}
	}
	for _, l := range m.Layers {
		entry.Layers = append(entry.Layers, blob(l.Digest))
	}
	return json.Marshal([]any{entry})
}

// others returns the archive that will be replaced.
func (d *archiveDest) others(context.Context) []string {
	if _, err := os.Stat(d.path); err != nil {
		return nil
	}
	return []string{"docker-archive:" + d.path}
}

func (d *archiveDest) close() {
	if d.f != nil {
		d.f.Close()
		os.Remove(d.f.Name())
	}
}

func sum(b []byte) v1.Hash {
	s := sha256.Sum256(b)
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(s[:])}
}
