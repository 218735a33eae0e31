package remote

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// A file is one file of a layout or archive, open.
type file struct {
	io.ReaderAt
	size  int64
	close func() error
}

// files are the files of an OCI image layout, wherever they lie. A name that is not
// there gives an error that is fs.ErrNotExist.
type files interface {
	open(name string) (file, error)
	Close() error
}

// local is the Source of an image in a layout or an archive.
type local struct {
	ref   Reference
	files files
	root  root
	// name returns a blob's name in files, and "" if there is none.
	name func(v1.Hash) string
}

func (l *local) wrap(err error) error { return wrap(l.ref, err) }

func (l *local) Stats() Stats { return Stats{} }
func (l *local) Close() error { return l.files.Close() }

func (l *local) Root(context.Context) (v1.Descriptor, []byte, error) {
	return l.root.desc, l.root.raw, nil
}

func (l *local) Manifest(ctx context.Context, desc v1.Descriptor) ([]byte, error) {
	if desc.Digest == l.root.desc.Digest {
		return l.root.raw, nil
	}
	if desc.Size > maxManifest {
		return nil, l.wrap(fmt.Errorf("manifest %v: %d bytes, of at most %d", desc.Digest, desc.Size, maxManifest))
	}
	return ReadBlob(ctx, l, desc, maxManifest)
}

func (l *local) Blob(desc v1.Descriptor) Blob { return &localBlob{l, desc.Digest, desc.Size} }

type localBlob struct {
	l      *local
	digest v1.Hash
	size   int64
}

func (b *localBlob) Size() int64 { return b.size }

func (b *localBlob) Range(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	if err := checkRange(b.digest, b.size, off, n); err != nil {
		return nil, b.l.wrap(err)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	f, err := b.l.openBlob(b.digest)
	if err != nil {
		return nil, b.l.wrap(err)
	}
	if f.size != b.size {
		f.close()
		return nil, b.l.wrap(fmt.Errorf("blob %v: has %d bytes, and its descriptor says %d: it is truncated or not the right one", b.digest, f.size, b.size))
	}
	return &localStream{ctx: ctx, r: io.NewSectionReader(f, off, n), f: f, left: n}, nil
}

func (l *local) openBlob(h v1.Hash) (file, error) {
	if err := checkHash(h); err != nil {
		return file{}, fmt.Errorf("blob %.100q: %w", h, err)
	}
	f, err := l.files.open(l.name(h))
	if errors.Is(err, fs.ErrNotExist) {
		return file{}, fmt.Errorf("blob %v: %w: the image is not complete there", h, ErrNotFound)
	}
	if err != nil {
		return file{}, fmt.Errorf("blob %v: %w", h, err)
	}
	return f, nil
}

// localStream is a range of a file. The size was checked when it was opened, so an end before left is 0
// means that somebody truncates the file now.
type localStream struct {
	ctx  context.Context // governs the stream, as Blob.Range says
	r    *io.SectionReader
	f    file
	left int64
}

func (s *localStream) Read(p []byte) (int, error) {
	if err := s.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := s.r.Read(p)
	s.left -= int64(n)
	if err == io.EOF && s.left > 0 {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

func (s *localStream) Close() error { return s.f.close() }

// dir is a directory as files. os.Root keeps symlinks from leading out of it.
type dir struct{ *os.Root }

func (d dir) open(name string) (file, error) {
	st, err := d.Stat(name)
	if err != nil {
		return file{}, err
	}
	if !st.Mode().IsRegular() { // opening a fifo would wait for a writer
		return file{}, fmt.Errorf("%s: not a regular file", name)
	}
	f, err := d.Open(name)
	if err != nil {
		return file{}, err
	}
	return file{f, st.Size(), f.Close}, nil
}

func blobName(h v1.Hash) string { return "blobs/" + h.Algorithm + "/" + h.Hex }

func openLayout(ctx context.Context, ref Reference) (Source, error) {
	root, err := os.OpenRoot(ref.path)
	if err != nil {
		return nil, wrap(ref, err)
	}
	l, err := newLayout(ctx, ref, dir{root})
	if err != nil {
		root.Close()
		return nil, wrap(ref, err)
	}
	return l, nil
}

// newLayout returns the source of the image in an OCI layout that ref names.
func newLayout(ctx context.Context, ref Reference, f files) (*local, error) {
	raw, err := readSmall(f, "index.json", maxManifest)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("not an OCI image layout: there is no index.json in it: %w", ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	index := new(v1.IndexManifest)
	if err := json.Unmarshal(raw, index); err != nil {
		return nil, fmt.Errorf("index.json: %w", err)
	}
	l := &local{ref: ref, files: f, name: blobName}
	desc, err := choose(index.Manifests, ref)
	if errors.Is(err, errNotListed) {
		// A digest may name what an index in here names, such as one platform's manifest.
		blob, berr := l.openBlob(ref.digest)
		if berr != nil {
			return nil, berr
		}
		blob.close()
		desc, err = v1.Descriptor{Digest: ref.digest, Size: blob.size}, nil
	}
	if err != nil {
		return nil, err
	}
	if desc.Size > maxManifest {
		return nil, fmt.Errorf("manifest %v: %d bytes, of at most %d", desc.Digest, desc.Size, maxManifest)
	}
	if l.root.raw, err = ReadBlob(ctx, l, desc, maxManifest); err != nil {
		return nil, err
	}
	if desc.MediaType, err = manifestType(l.root.raw, desc.MediaType); err != nil {
		return nil, fmt.Errorf("manifest %v: %w", desc.Digest, err)
	}
	l.root.desc = v1.Descriptor{MediaType: desc.MediaType, Size: desc.Size, Digest: desc.Digest}
	return l, nil
}

// readSmall returns a whole file of at most limit bytes.
func readSmall(f files, name string, limit int64) ([]byte, error) {
	in, err := f.open(name)
	if err != nil {
		return nil, err
	}
	defer in.close()
	if in.size > limit {
		return nil, fmt.Errorf("%s: %d bytes, of at most %d", name, in.size, limit)
	}
	b := make([]byte, in.size)
	if _, err := in.ReadAt(b, 0); err != nil && err != io.EOF {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return b, nil
}

var errNotListed = errors.New("not in index.json")

// maxListed is how many tags or platforms an error lists.
const maxListed = 32

const (
	refName        = "org.opencontainers.image.ref.name" // the layout's own: a tag, by custom
	containerdName = "io.containerd.image.name"          // docker save's, beside it: a whole name
)

// choose returns the entry of a layout's index.json that ref names.
func choose(entries []v1.Descriptor, ref Reference) (v1.Descriptor, error) {
	var tags []string
	for _, d := range entries {
		if t := d.Annotations[refName]; t != "" && len(tags) < maxListed {
			tags = append(tags, clean(t))
		}
	}
	listed := "there are no tags in it"
	if len(tags) > 0 {
		listed = "there is " + strings.Join(tags, ", ")
	}
	var fits func(v1.Descriptor) bool
	switch {
	case ref.digest != v1.Hash{}:
		fits = func(d v1.Descriptor) bool { return d.Digest == ref.digest }
	case ref.tag != "":
		fits = func(d v1.Descriptor) bool {
			return sameTag(d.Annotations[refName], ref.tag) || sameTag(d.Annotations[containerdName], ref.tag)
		}
	default:
		fits = func(d v1.Descriptor) bool { return len(entries) == 1 || d.Annotations[refName] == "latest" }
	}
	found := slices.DeleteFunc(slices.Clone(entries), func(d v1.Descriptor) bool { return !fits(d) })
	one := len(found) > 0 && !slices.ContainsFunc(found, func(d v1.Descriptor) bool { return d.Digest != found[0].Digest })
	switch {
	case one:
		d := found[0]
		if err := checkHash(d.Digest); err != nil {
			return d, fmt.Errorf("index.json: digest %.100q: %w", d.Digest, err)
		}
		return d, nil
	case len(found) > 0:
		return v1.Descriptor{}, fmt.Errorf("%d different images in it fit: choose one by its digest, such as @%v", len(found), found[0].Digest)
	case ref.digest != v1.Hash{}:
		return v1.Descriptor{}, errNotListed
	case ref.tag != "":
		return v1.Descriptor{}, fmt.Errorf("%w: no image with the tag %q: %s", ErrNotFound, ref.tag, listed)
	case len(entries) == 0:
		return v1.Descriptor{}, fmt.Errorf("%w: it is empty", ErrNotFound)
	}
	return v1.Descriptor{}, fmt.Errorf("%w: %d images in it, and none has the tag latest: choose one, by tag or by @digest: %s", ErrNotFound, len(entries), listed)
}

// sameTag reports whether a name that is stored means what a user typed: the same
// text, the same name by docker's defaults, or a name with that tag.
func sameTag(stored, typed string) bool {
	if stored == "" {
		return false
	}
	if stored == typed {
		return true
	}
	s, err := name.NewTag(stored)
	if err != nil {
		return false
	}
	if strings.ContainsAny(stored, ":/") && s.TagStr() == typed {
		return true
	}
	t, err := name.NewTag(typed)
	return err == nil && strings.ContainsAny(stored, ":/") && s.Name() == t.Name()
}
