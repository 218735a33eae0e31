package upper

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"lazuli/fs/toc"
)

const (
	whiteoutPrefix = ".wh."
	opaqueMarker   = ".wh..wh..opq"

	maxName = 255  // bytes of one element of a path
	maxPath = 4095 // bytes of a path
)

// A walk is one scan. Its fields belong to the goroutine that walks; the workers have a content each.
type walk struct {
	*Scan
	log     *slog.Logger
	lower   int // the root of Lower, O_PATH; -1 if there is none
	workers *errgroup.Group
	move    bool         // whether files may be renamed into the store
	mark    func() error // marks the upper directory as one with files missing

	entries  []toc.Entry
	contents []*content       // of each entry; nil if it has no chunks
	chunks   int64            // of all contents, those to come too
	links    map[inode]string // the first name of each file that has several

	names, xattrs         leftOut
	xattrList, xattrValue []byte
}

// A content is what a worker found in a file.
type content struct {
	chunks []toc.Chunk
	size   int64
}

// A dir is a directory that is merged of up to two.
type dir struct {
	name string // in the layer
	up   *node  // in the upper directory; nil if it is in the lower tree only
	low  place  // in the lower tree
	// listed says that the layer must have all that is in the directory, because it hides what is below.
	listed bool
}

func (w *walk) root(ctx context.Context, n *node) error {
	d := &dir{up: n, low: place{"", w.lower >= 0}}
	if err := w.entry(d.name, n, nil); err != nil {
		return err
	}
	return w.dir(ctx, d)
}

// dir adds all that is in d.
func (w *walk) dir(ctx context.Context, d *dir) error {
	var upper, lower []string
	var err error
	if d.up != nil {
		if upper, err = d.up.names(); err != nil {
			return fmt.Errorf("%q: %w", d.name, err)
		}
	}
	if d.listed && d.low.ok {
		if lower, err = w.lowerNames(d.low); err != nil {
			return fmt.Errorf("%q: in the metadata image: %q: %w", d.name, d.low.path, err)
		}
	}
	for len(upper)+len(lower) > 0 {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		var name string
		var visit func(context.Context, *dir, string) error
		if len(lower) == 0 || len(upper) > 0 && upper[0] <= lower[0] {
			name, visit = upper[0], w.upperFile
			if len(lower) > 0 && lower[0] == name {
				lower = lower[1:]
			}
			upper = upper[1:]
		} else {
			name, visit = lower[0], w.lowerFile
			lower = lower[1:]
		}
		if err := visit(ctx, d, name); err != nil {
			return err
		}
	}
	return nil
}

// lowerNames returns what is in a directory of the lower tree; nothing if there is no such directory.
func (w *walk) lowerNames(at place) ([]string, error) {
	n, err := w.lookLower(at)
	if n == nil {
		return nil, err
	}
	defer n.close()
	if !n.isDir() {
		return nil, nil
	}
	return n.names()
}

// lookLower opens a file of the lower tree. It returns nil if there is none at that place: overlayfs does not follow symlinks
// in a layer either.
func (w *walk) lookLower(at place) (*node, error) {
	if !at.ok || w.lower < 0 {
		return nil, nil
	}
	path := at.path
	if path == "" {
		path = "."
	}
	n, err := w.look(w.lower, path)
	switch err {
	case unix.ENOENT, unix.ENOTDIR, unix.ELOOP, unix.ENAMETOOLONG:
		return nil, nil
	}
	return n, err
}

// upperFile adds a file of the upper directory, and what is in it.
func (w *walk) upperFile(ctx context.Context, d *dir, name string) error {
	path := join(d.name, name)
	n, err := w.look(d.up.fd, name)
	if err == unix.ENOENT { // removed meanwhile
		return nil
	}
	if err != nil {
		return fmt.Errorf("%q: %w", path, err)
	}
	defer n.close()
	switch {
	case strings.HasPrefix(name, whiteoutPrefix):
		w.names.add(path)
		return nil
	case n.whiteout():
		if d.listed {
			return nil
		}
		return w.whiteout(d, name)
	case reserved(path), n.typ() == unix.S_IFSOCK:
		w.log.Debug("upper: left out", "name", path)
		return nil
	case n.isDir():
		return w.upperDir(ctx, d, name, n)
	}
	var c *content
	work := false
	if n.regular() && n.st.Size > 0 && !w.linked(n) {
		if n.metacopy {
			c, err = w.metacopy(d, name, n)
		} else {
			c, work, err = &content{}, true, w.count((n.st.Size-1)/toc.DefaultChunkSize+1)
		}
		if err != nil {
			return fmt.Errorf("%q: %w", path, err)
		}
	}
	if err := w.entry(path, n, c); err != nil || !work {
		return err
	}
	return w.work(ctx, d.up, name, path, n, c)
}

// reserved reports whether lazy layers have another use for a name. See [toc.FromTar].
func reserved(path string) bool {
	return path == toc.TarName || path == toc.PrefetchLandmark || path == toc.NoPrefetchLandmark
}

func (w *walk) upperDir(ctx context.Context, d *dir, name string, n *node) (err error) {
	sub := &dir{name: join(d.name, name), up: n, listed: d.listed}
	switch {
	case n.opaque: // wins over a redirect
		sub.listed = true
	case n.redirect != "":
		sub.listed = true
		if sub.low, err = redirected(d.low, n.redirect); err != nil {
			return fmt.Errorf("%q: %w", sub.name, err)
		}
	default:
		sub.low = d.low.child(name)
	}
	if err := w.entry(sub.name, n, nil); err != nil {
		return err
	}
	if sub.listed && !d.listed {
		if err := w.marker(join(sub.name, opaqueMarker), tar.TypeReg); err != nil {
			return err
		}
	}
	return w.dir(ctx, sub)
}

// lowerFile adds a file that is in the lower tree only, and what is in it.
func (w *walk) lowerFile(ctx context.Context, d *dir, name string) error {
	sub := &dir{name: join(d.name, name), low: d.low.child(name), listed: true}
	n, err := w.lookLower(sub.low)
	if err == nil && n == nil {
		err = errors.New("it was there and is not any more")
	}
	if err != nil {
		return fmt.Errorf("%q: in the metadata image: %q: %w", sub.name, sub.low.path, err)
	}
	defer n.close()
	var c *content
	if n.regular() && n.st.Size > 0 && !w.linked(n) {
		if c, err = w.object(n.redirect, n.st.Size); err != nil {
			return fmt.Errorf("%q: %w", sub.name, err)
		}
	}
	if err := w.entry(sub.name, n, c); err != nil || !n.isDir() {
		return err
	}
	return w.dir(ctx, sub)
}

// linked reports whether the layer has the file under another name already.
func (w *walk) linked(n *node) bool {
	_, ok := w.links[n.inode()]
	return ok && n.st.Nlink > 1
}

// metacopy returns the content of a file of the upper directory that has only its metadata there.
func (w *walk) metacopy(d *dir, name string, n *node) (*content, error) {
	at := d.low.child(name)
	if n.redirect != "" {
		var err error
		if at, err = redirected(d.low, n.redirect); err != nil {
			return nil, err
		}
	}
	low, err := w.lookLower(at)
	if err != nil {
		return nil, fmt.Errorf("in the metadata image: %q: %w", at.path, err)
	}
	if low == nil {
		// The kernel writes the path in the layer that the data was copied up from. If that is not the metadata image, it can only be the store.
		return w.object(n.redirect, n.st.Size)
	}
	defer low.close()
	if !low.regular() || low.st.Size != n.st.Size {
		return nil, fmt.Errorf("its data is at %q in the metadata image, which is not a file of %d bytes", at.path, n.st.Size)
	}
	return w.object(low.redirect, n.st.Size)
}

// object returns the content of an object of the lower layers.
func (w *walk) object(redirect string, size int64) (*content, error) {
	key, ok := objectKey(redirect)
	if !ok {
		return nil, errors.New("its data is in a lower layer, but the metadata image does not say which object it is")
	}
	var chunks []toc.Chunk
	if w.Chunks != nil {
		chunks, ok = w.Chunks(key)
	}
	if len(chunks) == 0 || !ok {
		return nil, fmt.Errorf("its data is object %v, which no lower layer has", key)
	}
	c := &content{chunks: slices.Clone(chunks)}
	for i := range c.chunks {
		c.chunks[i].Member, c.chunks[i].Inner = 0, 0
		if c.chunks[i].FileOffset != c.size {
			return nil, fmt.Errorf("its data is object %v, whose chunks have gaps", key)
		}
		c.size += c.chunks[i].Size
	}
	if c.size != size || toc.ObjectKey(c.chunks) != key {
		return nil, fmt.Errorf("its data is object %v of %d bytes, but the lower layers' chunks are another of %d", key, size, c.size)
	}
	return c, w.count(int64(len(chunks)))
}

// count takes note of chunks that are or will be in the layer.
func (w *walk) count(n int64) error {
	if w.chunks += n; w.chunks > toc.MaxChunks {
		return fmt.Errorf("more than %d chunks in the layer: it is too large, leave files out of it", toc.MaxChunks)
	}
	return nil
}

func (w *walk) whiteout(d *dir, name string) error {
	marker := join(d.name, whiteoutPrefix+name)
	if len(whiteoutPrefix+name) > maxName || len(marker) > maxPath {
		return w.marker(join(d.name, name), tar.TypeChar)
	}
	return w.marker(marker, tar.TypeReg)
}

// marker adds an entry that is no file, but hides one.
func (w *walk) marker(name string, typ byte) error {
	return w.add(&tar.Header{Name: name, Typeflag: typ}, nil)
}

// entry adds the entry of a file.
func (w *walk) entry(path string, n *node, c *content) error {
	h := &tar.Header{
		Name:    path,
		Mode:    int64(n.st.Mode & 0o7777),
		Uid:     int(n.st.Uid),
		Gid:     int(n.st.Gid),
		ModTime: time.Unix(n.st.Mtim.Unix()),
	}
	switch n.typ() {
	case unix.S_IFREG:
		h.Typeflag = tar.TypeReg
	case unix.S_IFDIR:
		h.Typeflag = tar.TypeDir
	case unix.S_IFLNK:
		h.Typeflag, h.Linkname = tar.TypeSymlink, n.target
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	case unix.S_IFCHR:
		h.Typeflag = tar.TypeChar
	case unix.S_IFBLK:
		h.Typeflag = tar.TypeBlock
	default:
		return fmt.Errorf("%q: a file of type %#o", path, n.typ())
	}
	if h.Typeflag == tar.TypeChar || h.Typeflag == tar.TypeBlock {
		h.Devmajor, h.Devminor = int64(unix.Major(n.st.Rdev)), int64(unix.Minor(n.st.Rdev))
	}
	if path == "" {
		h.Name = "./" // as tar has it
	}
	if !n.isDir() && n.st.Nlink > 1 {
		if first, ok := w.links[n.inode()]; ok {
			h.Typeflag, h.Linkname = tar.TypeLink, first
		} else {
			w.links[n.inode()] = path
		}
	}
	if len(n.xattrs) > 0 {
		h.PAXRecords = make(map[string]string, len(n.xattrs))
		for _, x := range n.xattrs {
			h.PAXRecords["SCHILY.xattr."+x.Name] = x.Value
		}
	}
	for _, name := range n.foreign {
		w.xattrs.add(fmt.Sprintf("%s of %q", name, path))
	}
	return w.add(h, c)
}

func (w *walk) add(h *tar.Header, c *content) error {
	e, err := toc.EntryFromHeader(h)
	if err != nil {
		return err
	}
	if len(w.entries) >= toc.MaxEntries {
		return fmt.Errorf("more than %d files in the layer: it is too large, leave files out of it", toc.MaxEntries)
	}
	w.entries = append(w.entries, e)
	w.contents = append(w.contents, c)
	return nil
}

// toc puts entries and contents together when the workers are done.
func (w *walk) toc() *toc.TOC {
	t := &toc.TOC{Compression: toc.Whole, Entries: w.entries}
	n := 0
	for _, c := range w.contents {
		if c != nil {
			n += len(c.chunks)
		}
	}
	t.Chunks = make([]toc.Chunk, 0, n)
	for i, c := range w.contents {
		e := &t.Entries[i]
		e.FirstChunk = uint32(len(t.Chunks))
		if c != nil {
			e.Size, e.NumChunks = c.size, uint32(len(c.chunks))
			t.Chunks = append(t.Chunks, c.chunks...)
			w.contents[i] = nil
		}
	}
	t.Digest = identity(t)
	return t
}

// identity returns the digest of all entries. It begins with a name, so that it is the digest of nothing else.
func identity(t *toc.TOC) toc.Digest {
	h := sha256.New()
	h.Write([]byte("lazuli upper directory, version 1\n"))
	var b []byte
	number := func(n uint64) { b = binary.BigEndian.AppendUint64(b, n) }
	text := func(s string) {
		number(uint64(len(s)))
		b = append(b, s...)
	}
	for i := range t.Entries {
		e := &t.Entries[i]
		b = b[:0]
		text(e.Name)
		text(e.Link)
		number(uint64(len(e.Xattrs)))
		for _, x := range e.Xattrs {
			text(x.Name)
			text(x.Value)
		}
		for _, n := range []uint64{
			uint64(e.Type), uint64(e.Size), uint64(e.MTime), uint64(e.MTimeNsec), uint64(e.UID), uint64(e.GID),
			uint64(e.Mode), uint64(e.Major), uint64(e.Minor), uint64(e.NumChunks),
		} {
			number(n)
		}
		key := toc.ObjectKey(t.Content(e))
		b = append(b, key[:]...)
		h.Write(b)
	}
	return toc.Digest(h.Sum(nil))
}
