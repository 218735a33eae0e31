// Package meta makes metadata images.
package meta

import (
	"fmt"
	"io"
	"iter"

	"lazuli/fs/toc"
)

// Version changes when the same layers give another metadata image than before, so
// that one that was kept is not taken for one that would be made now.
const Version = "lazuli-meta-1"

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
