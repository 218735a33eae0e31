package fetch

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"lazuli/fs/store"
	"lazuli/fs/toc"
)

// An Object is one object, open for reading. It may be used by several goroutines.
type Object struct {
	q    *Queue
	key  store.Key
	size int64
	srcs atomic.Pointer[[]source] // at least one; replaced when layers come and go

	// Under q.mu:
	refs   int
	state  int           // of q.changes for which srcs is true
	unused *list.Element // in q.unused, nil while refs is above 0

	mu   sync.Mutex
	file *os.File       // the complete object, or
	part *store.Partial // the one that is being completed; both nil if neither is here
	next int64          // where the last read in sequence ended
	head int64          // bytes to read ahead of it
}

// Open returns the object with a number that [Queue.Lookup] returned. The caller closes it.
func (q *Queue) Open(id uint64) (*Object, error) {
	q.mu.Lock()
	if o := q.objects[id]; o != nil && o.state == q.changes {
		o.hold()
		q.mu.Unlock()
		return o, nil
	}
	q.mu.Unlock()
	srcs, state, err := q.find(id)
	if err != nil {
		return nil, err
	}
	if len(srcs) == 0 {
		return nil, os.ErrNotExist
	}
	if err := check(srcs[0]); err != nil {
		return nil, err
	}
	key := store.Key(srcs[0].object.Key)
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return nil, errClosed
	}
	o := q.objects[id]
	if o == nil {
		o = &Object{q: q, key: key, size: srcs[0].object.Size, state: -1}
		q.objects[id] = o
	}
	if o.key != key {
		return nil, ErrAmbiguous
	}
	if o.state < state {
		o.srcs.Store(&srcs)
		o.state = state
	}
	o.hold()
	return o, nil
}

// check returns an error if the source's chunks are not those that the object's key names, or leave gaps. Nothing but a
// damaged disk makes them so.
func check(src source) error {
	at := int64(0)
	for i := range src.object.NumChunks() {
		c, _ := src.object.Chunk(i)
		if c.FileOffset != at || c.Size <= 0 {
			at = -1
			break
		}
		at += c.Size
	}
	if at != src.object.Size || !src.object.Verify() {
		return fmt.Errorf("%s: the chunk table is damaged at object %v: remove the image and pull it again", src.layer.Name, src.object.Key)
	}
	return nil
}

// hold counts one more user. The caller holds q.mu.
func (o *Object) hold() {
	o.refs++
	if o.unused != nil {
		o.q.unused.Remove(o.unused)
		o.unused = nil
	}
}

// Close gives the object back.
func (o *Object) Close() {
	q := o.q
	q.mu.Lock()
	defer q.mu.Unlock()
	if o.refs--; o.refs > 0 {
		return
	}
	o.unused = q.unused.PushBack(o)
	if q.unused.Len() > openObjects {
		old := q.unused.Remove(q.unused.Front()).(*Object)
		delete(q.objects, id(old.key))
		old.close() // before q.mu is unlocked: who opens it again finds nobody at its partial
	}
}

// close closes the files; nobody uses o any more.
func (o *Object) close() {
	o.mu.Lock()
	defer o.mu.Unlock()
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
func (o *Object) table() toc.Object { return o.first().object }

func (o *Object) first() source { return (*o.srcs.Load())[0] }

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
	if !errors.Is(err, fs.ErrNotExist) || t.NumChunks() == 1 && !o.hole() || o.first().layer.Table.Compression() == toc.Whole {
		return err // what has one chunk, or comes from a layer that is unpacked, is put whole
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
	case o.part != nil && o.published(): // another process has completed its own
		return o.file
	}
	return nil
}

// published reports whether the store has the object, and opens it. The caller holds o.mu.
func (o *Object) published() bool {
	if o.file == nil {
		if f, err := o.q.store.OpenObject(o.key); err == nil {
			o.file = f
		}
	}
	return o.file != nil
}

// has reports whether chunk i is here.
func (o *Object) has(i int) bool { return o.chunk(i) != nil }

// put stores chunk i, whose bytes have been verified.
func (o *Object) put(i int, p []byte) error {
	// Not what the table that named the chunk says of its place in the file: that was not checked.
	t := o.table()
	if i >= t.NumChunks() {
		return fmt.Errorf("object %v has no chunk %d", o.key, i)
	}
	c, _ := t.Chunk(i)
	if c.Size != int64(len(p)) {
		return fmt.Errorf("object %v: chunk %d has %d bytes, not %d", o.key, i, c.Size, len(p))
	}
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
	case errors.Is(err, fs.ErrNotExist) && t.NumChunks() == 1: // else the chunk is not the object
		return o.q.store.Put(o.key, p)
	}
	return err
}

// ReadAt reads len(p) bytes at off, as io.ReaderAt does, and waits for those that are not here. The error
// says what could not be had and why.
func (o *Object) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fs.ErrInvalid
	}
	if off >= o.size {
		return 0, io.EOF
	}
	var end error
	if r := o.q.recorder.Load(); r != nil {
		r.touch(o.key, off, int64(len(p)))
	}
	if int64(len(p)) > o.size-off {
		p, end = p[:o.size-off], io.EOF
	}
	if len(p) == 0 {
		return 0, nil
	}
	if r := o.complete(); r != nil {
		if err := o.readFull(r, p, off); err != nil {
			o.q.errors.Add(1)
			return 0, err
		}
		return len(p), end
	}
	o.ahead(off, int64(len(p)))
	if err := o.readChunks(ctx, p, off); err != nil {
		o.q.errors.Add(1)
		return 0, err
	}
	return len(p), end
}

// readFull fills p from a file of the store, which ends early only if it was damaged.
func (o *Object) readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("object %v in the store: %w", o.key, err)
}

// readChunks fills p with the bytes at off, chunk by chunk; all that are missing are asked for at once.
func (o *Object) readChunks(ctx context.Context, p []byte, off int64) error {
	if ok, err := o.readHere(p, off); ok || err != nil {
		return err
	}
	defer o.q.wait()()
	o.q.reads.Add(1)
	ctx, cancel := context.WithTimeoutCause(ctx, o.q.timeout,
		fmt.Errorf("no answer within %v", o.q.timeout))
	defer cancel()
	var err error
	for i, src := range *o.srcs.Load() {
		if i > 0 {
			if check(src) != nil {
				continue
			}
		}
		if err = o.readFrom(ctx, src, p, off); err == nil || ctx.Err() != nil {
			break
		}
	}
	return err
}

// readHere fills p with the bytes at off if all of them are here.
func (o *Object) readHere(p []byte, off int64) (bool, error) {
	t := o.table()
	for i := t.ChunkAt(off); len(p) > 0; i++ {
		c, _ := t.Chunk(i)
		n := min(int64(len(p)), c.FileOffset+c.Size-off)
		if ok, err := o.readChunk(i, c, p[:n], off); !ok || err != nil {
			return false, err
		}
		p, off = p[n:], off+n
	}
	return true, nil
}

// attempts is how often a read asks for a chunk that came, and was removed from the store before it was read.
const attempts = 3

func (o *Object) readFrom(ctx context.Context, src source, p []byte, off int64) error {
	if src.layer.Table.Compression() == toc.Whole {
		o.q.misses.Add(1)
		if err := o.q.whole(ctx, src.layer); err != nil {
			return err
		}
		o.mu.Lock()
		here := o.published()
		o.mu.Unlock()
		if !here {
			return fmt.Errorf("%s: object %v is not in the store after its layer was fetched", src.layer.Name, o.key)
		}
		return o.readFull(o.file, p, off)
	}
	first, last := src.object.ChunkAt(off), src.object.ChunkAt(off+int64(len(p))-1)
	for attempt := range attempts {
		flights := o.q.demand(o, src, first, last, attempt == 0)
		again := false
		for i := first; i <= last; i++ {
			c, _ := src.object.Chunk(i)
			from := max(off, c.FileOffset)
			to := min(off+int64(len(p)), c.FileOffset+c.Size)
			ok, err := o.waitChunk(ctx, i, c, flights[i-first], p[from-off:to-off], from)
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

// waitChunk reads the bytes at off, which lie in chunk i, once flight f has brought it; a nil f means that it is
// here. It reports false if the chunk is not where it should be.
func (o *Object) waitChunk(ctx context.Context, i int, c toc.Chunk, f *flight, p []byte, off int64) (bool, error) {
	if f != nil {
		o.q.needed.Add(int64(len(p)))
		if f.pack != nil {
			if !f.waitPack(ctx) {
				return false, context.Cause(ctx)
			}
		} else if err := f.wait(ctx); err != nil {
			return false, err
		}
		if data := f.chunk(o.key, i); data != nil {
			copy(p, data[off-c.FileOffset:])
			return true, nil
		}
	}
	return o.readChunk(i, c, p, off)
}

// readChunk reads the bytes at off, which lie in chunk i, and reports whether it is here.
func (o *Object) readChunk(i int, c toc.Chunk, p []byte, off int64) (bool, error) {
	if c.Hole {
		clear(p)
		return true, nil
	}
	r := o.chunk(i)
	if r == nil {
		return false, nil
	}
	err := o.readFull(r, p, off)
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
	if !sequential || end >= o.size || o.first().layer.Table.Compression() == toc.Whole {
		return
	}
	src := o.first()
	t := src.object
	if o.packed(src, t.ChunkAt(off), t.ChunkAt(end-1)) {
		return
	}
	// Asking again only when half of the window has been eaten makes requests large.
	middle := t.ChunkAt(min(end+head/2, o.size-1))
	if o.has(middle) || o.q.flying(src, middle) {
		return
	}
	o.q.ahead(src, t.ChunkAt(end), t.ChunkAt(min(end+head, o.size)-1))
}

// whole has an ordinary layer fetched and unpacked into the store, once for all who wait, and returns when it is in.
func (q *Queue) whole(ctx context.Context, l *Layer) error {
	q.mu.Lock()
	if q.closed {
		q.mu.Unlock()
		return errClosed
	}
	f := l.whole
	if f == nil {
		f = &wholeFlight{done: make(chan struct{})}
		l.whole = f
		q.work.Go(func() {
			f.err = l.Whole(l.ctx)
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

// retryDelay is how long to wait before attempt n (from 1) of a fetch.
func retryDelay(n int) time.Duration { return time.Duration(n*n) * 200 * time.Millisecond }
