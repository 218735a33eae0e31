package rootfs

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"hash"
	"reflect"
	"slices"
	"time"

	"lazuli/fs/toc"
)

// A comparison holds a table of contents against the tar of its layer. The two may tell of different trees, and each be what its
// digest says: who unpacks the layer then gets other files than who reads it lazily. Zero but for t, it is ready for
// a tar from the beginning.
type comparison struct {
	t *toc.TOC

	entry   int         // of t, behind that of the file which is read
	file    string      // its name
	chunks  []toc.Chunk // its chunks that were not seen to their ends
	read    int64       // bytes of the first of them
	sum     hash.Hash   // of those
	problem string      // the first that was found in a file's bytes
}

// data gets what is in the tar's files, as [toc.FromTar] gives it to its sink. Which files there are is entries' concern: here
// the next one with bytes in it is taken for the next in the table.
func (c *comparison) data(at toc.Chunk, p []byte) {
	if at.FileOffset == 0 {
		c.next()
	}
	for len(p) > 0 && len(c.chunks) > 0 && c.problem == "" {
		k := c.chunks[0]
		part := p[:min(int64(len(p)), k.Size-c.read)]
		p = p[len(part):]
		c.read += int64(len(part))
		if k.Hole {
			if len(bytes.Trim(part, "\x00")) > 0 {
				c.problem = fmt.Sprintf("%q has data at bytes %d to %d, where the table of contents has none", c.file, k.FileOffset, k.FileOffset+k.Size)
			}
		} else {
			c.sum.Write(part)
		}
		if c.read < k.Size {
			continue
		}
		if got := toc.Digest(c.sum.Sum(nil)); !k.Hole && got != k.Digest && c.problem == "" {
			c.problem = fmt.Sprintf("%q, bytes %d to %d: the digest in the tar is %v, in the table of contents %v", c.file, k.FileOffset, k.FileOffset+k.Size, got, k.Digest)
		}
		c.chunks, c.read = c.chunks[1:], 0
		c.sum.Reset()
	}
}

// next goes on to the next file of the table that has bytes.
func (c *comparison) next() {
	c.chunks, c.read, c.sum = nil, 0, sha256.New()
	for c.entry < len(c.t.Entries) && len(c.chunks) == 0 {
		e := &c.t.Entries[c.entry]
		c.file, c.chunks = e.Name, c.t.Content(e)
		c.entry++
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
