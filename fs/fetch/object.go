package fetch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"sync"
	"time"

	"lazuli/fs/store"
	"lazuli/fs/toc"
)

// An Object is one object, open for reading. It may be used by several goroutines.
type Object struct {
	q    *Queue
	key  store.Key
	size int64
	srcs []source // at least one

	refs int // under q.mu

	mu   sync.Mutex
	file *os.File       // the complete object, or
	part *store.Partial // the one that is being completed; both nil if neither is here
	next int64          // where the last read in sequence ended
	head int64          // bytes to read ahead of it
}

// Open returns the object with a number that [Queue.Lookup] returned. The caller closes it.
func (q *Queue) Open(id uint64) (*Object, error) {
	srcs, err := q.find(id)
	if err != nil {
		return nil, err
	}
	if len(srcs) == 0 {
		return nil, os.ErrNotExist
	}
	return q.open(srcs)
}

func (q *Queue) open(srcs []source) (*Object, error) {
	key := store.Key(srcs[0].object.Key)
	q.mu.Lock()
	defer q.mu.Unlock()
	o := q.objects[key]
	if o == nil {
		if !srcs[0].object.Verify() {
			return nil, fmt.Errorf("%s: the chunk table is damaged at object %v: remove the image and pull it again", srcs[0].layer.Name, key)
		}
		o = &Object{q: q, key: key, size: srcs[0].object.Size, srcs: srcs}
		q.objects[key] = o
	}
	if o.refs == 0 {
		if i := slices.Index(q.lru, o); i >= 0 {
			q.lru = slices.Delete(q.lru, i, i+1)
		}
	}
	o.refs++
	return o, nil
}

// Close gives the object back.
func (o *Object) Close() {
	o.q.mu.Lock()
	defer o.q.mu.Unlock()
	o.refs--
	if o.refs > 0 {
		return
	}
	o.q.lru = append(o.q.lru, o)
	if len(o.q.lru) > openObjects {
		old := o.q.lru[0]
		o.q.lru = slices.Delete(o.q.lru, 0, 1)
		delete(o.q.objects, old.key)
		old.close()
	}
}

// close closes the files; nobody uses o any more.
func (o *Object) close() {
	if o.file != nil {
		o.file.Close()
	}
	if o.part != nil {
		o.part.Close()
	}
	o.file, o.part = nil, nil
}

// Size is the object's length in bytes.
func (o *Object) Size() int64 { return o.size }

// table is the object as the layer that is asked first has it.
func (o *Object) table() toc.Object { return o.srcs[0].object }

// open opens what is here of the object: the complete one, else if it has several chunks the one that is being
// completed. The caller holds o.mu.
func (o *Object) open() error {
	if o.file != nil || o.part != nil && !o.part.Complete() {
		return nil
	}
	f, err := o.q.store.OpenObject(o.key)
	if err == nil {
		o.file = f // o.part stays open with it: somebody may be reading
		return nil
	}
	if o.part != nil { // complete, and then removed from the store: its bytes last while it is open
		return nil
	}
	t := o.table()
	if !errors.Is(err, fs.ErrNotExist) || t.NumChunks() == 1 && !o.hole() {
		return err
	}
	p, err := o.q.store.OpenPartial(o.key, o.size, t.NumChunks())
	if err != nil {
		return err
	}
	for i := range t.NumChunks() {
		if c, _ := t.Chunk(i); c.Hole {
			if _, err := p.Put(i, nil, c.FileOffset); err != nil {
				p.Close()
				return err
			}
		}
	}
	o.part = p
	return nil
}

// hole reports whether the object is one single hole.
func (o *Object) hole() bool {
	c, _ := o.table().Chunk(0)
	return o.table().NumChunks() == 1 && c.Hole
}

// complete returns the object's file if all of it is here, else nil.
func (o *Object) complete() io.ReaderAt {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.open(); o.file == nil {
		return nil
	}
	return o.file
}

// chunk returns what chunk i can be read from, or nil if it is not here.
func (o *Object) chunk(i int) io.ReaderAt {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.open()
	switch {
	case o.file != nil:
		return o.file
	case o.part != nil && o.part.Has(i):
		return o.part
	}
	return nil
}

// has reports whether chunk i is here.
func (o *Object) has(i int) bool { return o.chunk(i) != nil }

// put stores chunk i, whose bytes have been verified.
func (o *Object) put(i int, c toc.Chunk, p []byte) error {
	o.mu.Lock()
	err := o.open()
	file, part := o.file, o.part
	o.mu.Unlock()
	switch {
	case file != nil:
		return nil
	case part != nil:
		_, err = part.Put(i, p, c.FileOffset)
		return err
	case errors.Is(err, fs.ErrNotExist):
		return o.q.store.Put(o.key, p)
	}
	return err
}

// ReadAt reads len(p) bytes at off, as io.ReaderAt does, and waits for those that are not here. The error
// says what could not be had and why.
func (o *Object) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if off >= o.size {
		return 0, io.EOF
	}
	short := int64(len(p)) > o.size-off
	if short {
		p = p[:o.size-off]
	}
	if len(p) == 0 {
		return 0, nil
	}
	if r := o.complete(); r != nil {
		return readFull(r, p, off, short)
	}
	o.ahead(off, int64(len(p)))
	if err := o.readChunks(ctx, p, off); err != nil {
		o.q.errors.Add(1)
		return 0, err
	}
	if short {
		return len(p), io.EOF
	}
	return len(p), nil
}

func readFull(r io.ReaderAt, p []byte, off int64, short bool) (int, error) {
	n, err := r.ReadAt(p, off)
	if err == io.EOF && !short && n == len(p) {
		err = nil
	}
	return n, err
}

// readChunks fills p with the bytes at off, chunk by chunk; all that are missing are asked for at once.
func (o *Object) readChunks(ctx context.Context, p []byte, off int64) error {
	ctx, cancel := context.WithTimeoutCause(ctx, o.q.timeout,
		fmt.Errorf("no answer within %v", o.q.timeout))
	defer cancel()
	var err error
	for _, src := range o.srcs {
		if err = o.readFrom(ctx, src, p, off); err == nil || ctx.Err() != nil {
			break
		}
	}
	return err
}

// attempts is how often a read asks for a chunk whose member came but whose bytes the store
// could not keep until they were read.
const attempts = 3

func (o *Object) readFrom(ctx context.Context, src source, p []byte, off int64) error {
	if src.layer.Table.Compression() == toc.Whole {
		if err := o.q.whole(ctx, src.layer); err != nil {
			return err
		}
		r := o.complete()
		if r == nil {
			return fmt.Errorf("%s: object %v is not in the store after its layer was fetched", src.layer.Name, o.key)
		}
		_, err := readFull(r, p, off, false)
		return err
	}
	first, last := src.object.ChunkAt(off), src.object.ChunkAt(off+int64(len(p))-1)
	for range attempts {
		flights := o.q.demand(o, src, first, last)
		again := false
		for i := first; i <= last; i++ {
			c, _ := src.object.Chunk(i)
			from := max(off, c.FileOffset)
			to := min(off+int64(len(p)), c.FileOffset+c.Size)
			ok, err := o.readChunk(ctx, i, c, flights[i-first], p[from-off:to-off], from)
			if err != nil {
				releaseAll(flights)
				return fmt.Errorf("%s: %w", src.layer.Name, err)
			}
			again = again || !ok
		}
		releaseAll(flights)
		if !again {
			return nil
		}
	}
	return fmt.Errorf("%s: object %v went away while it was read", src.layer.Name, o.key)
}

func releaseAll(flights []*flight) {
	for _, f := range flights {
		if f != nil {
			f.release()
		}
	}
}

// readChunk reads the bytes at off, which lie in chunk i, once flight f has brought it; a nil f means that it is
// here. It reports false if the chunk is not where it should be.
func (o *Object) readChunk(ctx context.Context, i int, c toc.Chunk, f *flight, p []byte, off int64) (bool, error) {
	if c.Hole {
		clear(p)
		return true, nil
	}
	if f != nil {
		o.q.misses.Add(1)
		o.q.needed.Add(int64(len(p)))
		done := o.q.wait()
		err := f.wait(ctx)
		done()
		if err != nil {
			return false, err
		}
		if data := f.chunk(o.key, i); data != nil {
			copy(p, data[off-c.FileOffset:])
			return true, nil
		}
	}
	r := o.chunk(i)
	if r == nil {
		return false, nil
	}
	_, err := readFull(r, p, off, false)
	return err == nil, err
}

// ahead looks whether a read continues the last one, and if so has what follows fetched, twice
// as far each time.
func (o *Object) ahead(off, n int64) {
	o.mu.Lock()
	end := off + n
	sequential := off <= o.next && end > o.next && o.next > 0
	switch {
	case sequential:
		o.head = min(max(2*o.head, firstWindow), maxWindow)
	case off != 0:
		o.head = 0
	}
	if end > o.next || !sequential {
		o.next = end
	}
	head := o.head
	o.mu.Unlock()
	if !sequential || end >= o.size || o.srcs[0].layer.Table.Compression() == toc.Whole {
		return
	}
	// Asking again only when half of the window has been eaten makes requests large.
	t := o.table()
	middle := t.ChunkAt(min(end+head/2, o.size-1))
	if o.has(middle) || o.q.flying(o.srcs[0], middle) {
		return
	}
	o.q.ahead(o.srcs[0], t.ChunkAt(end), t.ChunkAt(min(end+head, o.size)-1))
}

// whole has an ordinary layer fetched and unpacked into the store, once for all who wait, and returns when it is in.
func (q *Queue) whole(ctx context.Context, l *Layer) error {
	done := q.wait()
	defer done()
	q.mu.Lock()
	f := l.whole
	if f == nil {
		f = &wholeFlight{done: make(chan struct{})}
		l.whole = f
		q.work.Go(func() {
			f.err = l.Whole(q.ctx)
			q.mu.Lock()
			l.whole = nil
			q.mu.Unlock()
			close(f.done)
		})
	}
	q.mu.Unlock()
	select {
	case <-f.done:
		if f.err != nil {
			return fmt.Errorf("%s: %w", l.Name, f.err)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s: %w", l.Name, context.Cause(ctx))
	}
}

// A wholeFlight is an ordinary layer that is being fetched.
type wholeFlight struct {
	done chan struct{}
	err  error // set before done is closed
}

// complete reports whether every object of l is in the store.
func (q *Queue) complete(l *Layer) bool {
	for i := range l.Table.Len() {
		if !q.store.Has(store.Key(l.Table.At(i).Key)) {
			return false
		}
	}
	return true
}

// retryDelay is how long to wait before attempt n (from 1) of a fetch.
func retryDelay(n int) time.Duration { return time.Duration(n*n) * 200 * time.Millisecond }
