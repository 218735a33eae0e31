package upper

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"lazuli/fs/store"
	"lazuli/fs/toc"
)

// onceMark returns what marks the upper directory, once.
func onceMark(upper int) func() error {
	return sync.OnceValue(func() error {
		if err := unix.Setxattr(procPath(upper), moved, []byte("y"), 0); err != nil {
			return fmt.Errorf("xattr %s: %w", moved, err)
		}
		return nil
	})
}

// A file is what a worker gets: a regular file of the upper directory that is not empty.
type file struct {
	*node
	dir  int // the directory that has it, O_PATH; -1 if it is not to be moved
	name string
	path string // in the layer
}

func (f *file) close() {
	f.node.close()
	if f.dir >= 0 {
		unix.Close(f.dir)
	}
}

// work has a worker read n, which is closed when that is done, into c.
func (w *walk) work(ctx context.Context, dir *node, name, path string, n *node, c *content) error {
	own := *n
	n.fd = -1
	f := &file{&own, -1, name, path}
	// Whoever has another name of the file could write to it.
	if w.move && n.st.Nlink == 1 {
		var err error
		if f.dir, err = unix.FcntlInt(uintptr(dir.fd), unix.F_DUPFD_CLOEXEC, 0); err != nil {
			f.close()
			return fmt.Errorf("%q: %w", path, err)
		}
	}
	w.workers.Go(func() error {
		defer f.close()
		found, err := w.content(ctx, f)
		if err != nil {
			return fmt.Errorf("%q: %w", path, err)
		}
		*c = found
		return nil
	})
	return nil
}

// content puts the file's content into the store, and returns its chunks.
func (w *walk) content(ctx context.Context, f *file) (content, error) {
	fd, err := unix.Open(procPath(f.fd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return content{}, fmt.Errorf("open: %w", err)
	}
	src := os.NewFile(uintptr(fd), f.path)
	defer src.Close()
	if f.dir >= 0 {
		c, err := w.adopt(ctx, f, src)
		if err == nil {
			return c, nil
		}
		if ctx.Err() != nil {
			return content{}, context.Cause(ctx)
		}
		w.log.Debug("upper: copied, because it cannot be moved into the store", "file", f.path, "upper", w.Upper, "err", err)
	}
	return w.copy(ctx, f, src)
}

// copy puts a copy of src into the store. The chunks are those of the copy, whatever happens to src meanwhile.
func (w *walk) copy(ctx context.Context, f *file, src *os.File) (content, error) {
	temp, err := w.Store.Create()
	if err != nil {
		return content{}, err
	}
	defer temp.Discard()
	c, err := w.hash(ctx, f, src, temp)
	if err != nil || c.size == 0 {
		return c, err
	}
	return c, temp.Publish(c.key())
}

func (c *content) key() store.Key { return store.Key(toc.ObjectKey(c.chunks)) }

// adopt makes src itself an object, if nobody else has it open. If not, the error says why, and src can
// still be read.
//
// A write lease is had by who is alone with a file, and is lost when somebody opens it. Who holds
// it from before the first byte is read until the file has no name any more that others know has
// hashed what the object will be.
func (w *walk) adopt(ctx context.Context, f *file, src *os.File) (content, error) {
	if _, err := unix.FcntlInt(src.Fd(), unix.F_SETLEASE, unix.F_WRLCK); err != nil {
		return content{}, fmt.Errorf("write lease: %w", err)
	}
	// Without this, who opens the file waits until src is closed.
	defer unix.FcntlInt(src.Fd(), unix.F_SETLEASE, unix.F_UNLCK)
	c, err := w.hash(ctx, f, src, nil)
	if err != nil {
		return content{}, err
	}
	if w.Store.Has(c.key()) { // then it goes away with the upper directory
		return c, nil
	}
	if err := w.mark(); err != nil {
		return content{}, err
	}
	temp, err := w.Store.Adopt(src, f.dir, f.name)
	if err != nil {
		return content{}, err
	}
	defer temp.Discard()
	var st unix.Stat_t
	if err := unix.Fstat(int(src.Fd()), &st); err != nil {
		return content{}, err
	}
	if lease, err := unix.FcntlInt(src.Fd(), unix.F_GETLEASE, 0); err != nil || lease != unix.F_WRLCK || st.Size != c.size {
		return content{}, errors.New("somebody opened it meanwhile")
	}
	return c, temp.Publish(c.key())
}

var buffers = sync.Pool{New: func() any { return new([toc.DefaultChunkSize]byte) }}

// hash reads src, up to the size that f had or to its end, and writes it to temp, which may be nil.
func (w *walk) hash(ctx context.Context, f *file, src *os.File, temp *store.Temp) (content, error) {
	buf := buffers.Get().(*[toc.DefaultChunkSize]byte)
	defer buffers.Put(buf)
	c := content{chunks: make([]toc.Chunk, 0, (f.st.Size-1)/toc.DefaultChunkSize+1)}
	for c.size < f.st.Size {
		if ctx.Err() != nil {
			return content{}, context.Cause(ctx)
		}
		data := buf[:min(toc.DefaultChunkSize, f.st.Size-c.size)]
		chunk := toc.Chunk{FileOffset: c.size, Size: int64(len(data))}
		var err error
		if f.sparse() && hole(src, c.size, chunk.Size) {
			// Not a hole to the layer, but zeros, as in a tar: the same file has one key, whoever made it.
			chunk.Digest = zeros(data)
			if temp != nil {
				err = temp.WriteHole(chunk.Size)
			}
		} else {
			var n int
			if n, err = src.ReadAt(data, c.size); err != nil && err != io.EOF {
				return content{}, err
			}
			if n == 0 {
				return c, nil // it has become shorter
			}
			data, chunk.Size = data[:n], int64(n)
			chunk.Digest = sha256.Sum256(data)
			err = nil
			if temp != nil {
				_, err = temp.Write(data)
			}
		}
		if err != nil {
			return content{}, err
		}
		c.chunks = append(c.chunks, chunk)
		c.size += chunk.Size
	}
	return c, nil
}

// hole reports whether f has no data in the n bytes at off. A file system that does not know says that it has.
func hole(f *os.File, off, n int64) bool {
	data, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
	return err == unix.ENXIO || err == nil && data >= off+n
}

var zeroChunk = sync.OnceValue(func() toc.Digest { return sha256.Sum256(make([]byte, toc.DefaultChunkSize)) })

// zeros returns the digest of len(p) zero bytes, and may write them to p.
func zeros(p []byte) toc.Digest {
	if len(p) == toc.DefaultChunkSize {
		return zeroChunk()
	}
	clear(p)
	return sha256.Sum256(p)
}
