package rootfs

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"hash"
	"reflect"
	"slices"
	"time"

	"lazuli/fs/store"
	"lazuli/fs/toc"
)

// A comparison holds a table of contents against the tar of its layer. The two may tell of different trees, and each be what its
// digest says: who unpacks the layer then gets other files than who reads it lazily. Zero but for t, it is ready for
// a tar from the beginning.
type comparison struct {
	t *toc.TOC

	// land gets the chunks that are not here. Nil is nobody.
	land *landing

	entry   int         // of t, behind that of the file which is read
	file    string      // its name
	chunks  []toc.Chunk // its chunks that were not seen to their ends
	read    int64       // bytes of the first of them
	sum     hash.Hash   // of those, or
	kept    []byte      // those, if it is to land
	lands   bool
	object  store.Key // of the file, with land
	place   int       // of the first of chunks in it
	problem string    // the first that was found in a file's bytes
}

// data gets what is in the tar's files, as [toc.FromTar] gives it to its sink. Which files there are is entries' concern: here
// the next one with bytes in it is taken for the next in the table.
func (c *comparison) data(at toc.Chunk, p []byte) {
	if at.FileOffset == 0 {
		c.next()
	}
	for len(p) > 0 && len(c.chunks) > 0 && c.problem == "" {
		k := c.chunks[0]
		if c.read == 0 {
			c.lands = c.land != nil && !k.Hole && c.land.lacks(c.object, c.place)
		}
		part := p[:min(int64(len(p)), k.Size-c.read)]
		p = p[len(part):]
		c.read += int64(len(part))
		switch {
		case k.Hole:
			if len(bytes.Trim(part, "\x00")) > 0 {
				c.problem = fmt.Sprintf("%q has data at bytes %d to %d, where the table of contents has none", c.file, k.FileOffset, k.FileOffset+k.Size)
			}
		case c.lands:
			c.kept = append(c.kept, part...)
		default:
			c.sum.Write(part)
		}
		if c.read < k.Size {
			continue
		}
		if got := c.digest(); !k.Hole && got != k.Digest && c.problem == "" {
			c.problem = fmt.Sprintf("%q, bytes %d to %d: the digest in the tar is %v, in the table of contents %v", c.file, k.FileOffset, k.FileOffset+k.Size, got, k.Digest)
		}
		c.chunks, c.read = c.chunks[1:], 0
		c.place++
	}
}

// digest returns the digest of the chunk that was read to its end, which lands by that if it is to.
func (c *comparison) digest() (got toc.Digest) {
	if c.lands {
		got = c.land.take(c.object, c.place, c.kept)
		if c.kept = c.kept[:0]; cap(c.kept) > maxKept {
			c.kept = nil
		}
		return got
	}
	got = toc.Digest(c.sum.Sum(nil))
	c.sum.Reset()
	return got
}

// maxKept is how many bytes are kept allocated for chunks: few have larger ones.
const maxKept = 4 << 20

// next goes on to the next file of the table that has bytes.
func (c *comparison) next() {
	c.chunks, c.read, c.place, c.sum, c.kept = nil, 0, 0, sha256.New(), c.kept[:0]
	for c.entry < len(c.t.Entries) && len(c.chunks) == 0 {
		e := &c.t.Entries[c.entry]
		c.file, c.chunks = e.Name, c.t.Content(e)
		c.entry++
	}
	if c.land != nil {
		c.object = store.Key(toc.ObjectKey(c.chunks))
	}
}

// lie says how the table of contents and the tar, of which data has seen everything, differ for who runs the image, or
// returns "". An xattr without a value that one of them has not got is no difference: containers/storage's tables have none such.
func (c *comparison) lie(tar *toc.TOC) string {
	if len(c.t.Entries) != len(tar.Entries) {
		return fmt.Sprintf("the table of contents has %d entries, the tar has %d", len(c.t.Entries), len(tar.Entries))
	}
	for i := range tar.Entries {
		a, b := c.t.Entries[i], tar.Entries[i]
		a.Xattrs, b.Xattrs = withValue(a.Xattrs), withValue(b.Xattrs)
		if !sameEntry(a, b) {
			return fmt.Sprintf("%q is not the same in the table of contents and in the tar", b.Name)
		}
	}
	return c.problem
}

func withValue(list []toc.Xattr) []toc.Xattr {
	return slices.DeleteFunc(slices.Clone(list), func(x toc.Xattr) bool { return x.Value == "" })
}

// sameEntry reports whether an entry of a table of contents is that of the tar, but for what is in the file.
func sameEntry(a, tar toc.Entry) bool {
	a.FirstChunk, a.NumChunks, tar.FirstChunk, tar.NumChunks = 0, 0, 0, 0
	// Writers other than ours round to seconds.
	if off := time.Unix(tar.MTime, int64(tar.MTimeNsec)).Sub(time.Unix(a.MTime, 0)); a.MTimeNsec == 0 && off.Abs() <= time.Second/2 {
		tar.MTime, tar.MTimeNsec = a.MTime, 0
	}
	if !slices.Equal(a.Xattrs, tar.Xattrs) {
		return false
	}
	a.Xattrs, tar.Xattrs = nil, nil
	return reflect.DeepEqual(a, tar)
}
