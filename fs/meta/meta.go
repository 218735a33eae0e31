// Package meta makes metadata images: the layers of an image, merged into one tree, as an
// EROFS image without data. In go the layers' tables of contents, out comes a file that
// Linux mounts through a loop device as the first lower layer of an overlay:
//
//	mount -t erofs -o loop,ro META.erofs META
//	mount -t overlay -o lowerdir=META::OBJECTS,metacopy=on,redirect_dir=on,… overlay DIR
//
// EROFS serves names, modes, owners, times, links and xattrs. A regular file has its size and one
// large hole, and two xattrs for overlayfs: trusted.overlay.metacopy, empty, says that its data
// is elsewhere, and trusted.overlay.redirect where: "/a/bcdef…" in the data-only layers behind
// "::", which is the object key in hexadecimal with a slash behind the first digit.
// Empty files have neither.
//
// # Merging
//
// The tree is what somebody sees who has the same image unpacked by containerd and mounted by
// overlayfs. So it is made in the same two steps. Each layer by itself becomes a tree, in
// the order of its entries: a later entry takes the place of an earlier one unless both are
// directories; a hard link means the file that has the name at that moment, gives it the
// link's own owner, mode, time and xattrs, and does not reach into other layers; names lead
// through symlinks of the same layer, within the root; a directory without an entry
// has the attributes that a lower layer has for it, or mode 0755 and owner 0:0. Then
// the trees are put on top of each other: a name hides those below, whiteouts
// (".wh.NAME" and character devices 0:0) hide and are not shown, and directories merge down to
// the first one that is opaque.
//
// Xattrs are those that the unpacker sets: not "trusted.", not unknown namespaces, "user." on files
// and directories only. ACLs follow the mode.
//
// Link counts are those that overlayfs shows: a file's counts the names of its own layer, also
// those that a higher layer hides; a merged directory has one link.
//
// Where the unpacker fails or depends on the clock, this package is kinder: a whiteout of a
// name that the same layer has is ignored, in either order; a directory that is replaced by a file in
// the layer that made it is no error; a directory without any entry is from 1970. Times before 1970 stay
// what they are (containerd makes 1970 of them), and the root has the attributes of its
// entry (containerd ignores it). Default ACLs do not spread to new files.
//
// # Invariants
//
// No name leads out of the tree, and none is longer than Linux takes. No xattr of overlayfs comes from a layer:
// such a layer is refused. No file is mounted whose chunks do not add up to its size. Nothing in the image depends
// on the time, the machine or the order of a map: the same layers make the same bytes. The image has
// neither a byte of a file nor a block address for one. Work and memory are bounded by the
// size of the TOCs and by [toc.MaxEntries].
//
// A [Tree] is immutable and safe for concurrent use. It refers to the TOCs, so they stay
// in memory as long as it does.
//
// Sources: the format, https://docs.kernel.org/filesystems/erofs.html, https://erofs.docs.kernel.org and
// fs/erofs/erofs_fs.h; data-only layers, https://docs.kernel.org/filesystems/overlayfs.html;
// whiteouts, https://github.com/opencontainers/image-spec/blob/main/layer.md; the
// unpacker, pkg/archive/tar.go and tar_opts_linux.go of containerd.
package meta

import (
	"fmt"
	"io"
	"iter"

	"lazuli/fs/toc"
)

// Version changes when the same layers give another metadata image than before, so
// that one that was kept is not taken for one that would be made now.
const Version = "lazuli-meta-2"

// Build writes the metadata image of the layers, the lowest first, to w, and says
// what is in it. It is [Merge] and [Tree.WriteTo].
func Build(w io.Writer, layers []*toc.TOC) (Stats, error) {
	t, err := Merge(layers)
	if err != nil {
		return Stats{}, err
	}
	_, err = t.WriteTo(w)
	return t.Stats(), err
}

// An Object is what a regular file of a tree refers to for its content.
type Object struct {
	Key toc.Digest
	// Layer and Entry say where its chunks are: in entry Entry of the
	// tree's layer Layer, counted from 0, the lowest layer first.
	Layer, Entry int
}

// Objects returns the object of every regular file that is not empty. An object comes as often as
// there are inodes with its content.
func (t *Tree) Objects() iter.Seq[Object] {
	return func(yield func(Object) bool) {
		for _, n := range t.order {
			in := &t.inodes[n]
			if in.typ != toc.Regular || in.place.size == 0 {
				continue
			}
			if !yield(Object{t.keys[in.place.key], int(in.layer), int(in.entry)}) {
				return
			}
		}
	}
}

// checkContent reports whether the chunks of e, an entry of layer i, are its content.
func (m *merger) checkContent(i int, e *toc.Entry) error {
	if e.Size < 0 || e.Size > maxFileSize {
		return fmt.Errorf("size %d: at most %d", e.Size, int64(maxFileSize))
	}
	chunks := m.layers[i].Chunks
	if uint64(e.FirstChunk)+uint64(e.NumChunks) > uint64(len(chunks)) {
		return fmt.Errorf("chunks %d to %d of %d", e.FirstChunk, uint64(e.FirstChunk)+uint64(e.NumChunks), len(chunks))
	}
	var off int64
	for _, c := range m.layers[i].Content(e) {
		if c.FileOffset != off || c.Size <= 0 || c.Size > e.Size-off {
			return fmt.Errorf("chunk at %d of %d bytes, after %d of %d", c.FileOffset, c.Size, off, e.Size)
		}
		off += c.Size
	}
	if off != e.Size {
		return fmt.Errorf("chunks of %d bytes for %d", off, e.Size)
	}
	return nil
}
