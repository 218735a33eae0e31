package fetch

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"lazuli/fs/pack"
	"lazuli/fs/store"
	"lazuli/fs/toc"
)

// A packID names a chunk that a startup pack brings, by its object's number.
type packID struct {
	object uint64
	chunk  int
}

// A packed is a startup pack that is arriving.
type packed struct {
	begun   time.Time
	arrived atomic.Int64 // bytes of it
}

// soon returns for how long to wait for what ends at byte end of the pack, and whether that is worth it: if not, asking for it is
// faster.
func (p *packed) soon(end int64) (time.Duration, bool) {
	arrived := p.arrived.Load()
	if arrived >= end {
		return packPatience, true // it is being unpacked
	}
	took := time.Since(p.begun)
	if arrived == 0 {
		return packPatience, took < packPatience
	}
	// At the speed so far, which is less than the speed now while a connection grows.
	wait := time.Duration(float64(took) * float64(end-arrived) / float64(arrived))
	return packPatience + 2*wait, wait < packPatience
}

// packPatience is for how long a read waits for a pack rather than for an answer of its own: some round trips of most links.
const packPatience = 150 * time.Millisecond

// packHold is for how long a pack keeps fills off the link: a pack that never ends must not do so for ever.
const packHold = time.Minute

// PackStats says what came of a startup pack.
type PackStats struct {
	Bytes  int64 // of the pack that arrived
	Chunks int   // that it has
	Here   int   // of those, that were in the store already
	Bad    int   // that were not what the tables of contents say, or of unknown objects
}

// maxBad is how many frames of a pack may be bad before the rest is not looked at.
const maxBad = 8

// ErrBadPack says that a startup pack was given up because of what was in it.
var ErrBadPack = errors.New("the startup pack is not of this image, or damaged")

// Pack takes the frames of a startup pack into the store. open returns the pack from byte off on; at is where its first frame begins.
// layers are those that it has chunks of, and were added. Chunks that are in it are not asked for otherwise while they are expected soon. Nothing is
// believed: what does not verify is dropped, and a pack that has too much of it is given up with [ErrBadPack].
func (q *Queue) Pack(ctx context.Context, x *pack.Index, at int64, open func(ctx context.Context, off int64) (io.ReadCloser, error), layers ...*Layer) (PackStats, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(q.ctx, func() { cancel(errClosed) })()
	for _, l := range layers {
		l.packed.Store(true)
	}
	free := q.holdFills()
	defer free()
	defer time.AfterFunc(packHold, free).Stop()
	p := &packed{begun: time.Now()}
	u := &unpacking{q: q, p: p}
	flights := q.expect(x, p, at, u)
	begun := time.Now()
	var s PackStats
	err := u.read(ctx, x, at, open, flights)
	for _, f := range flights { // those that did not come
		if f != nil {
			q.landed(f, errors.Join(err, errNotPacked))
		}
	}
	u.work.Wait()
	s.Bytes, s.Here, s.Bad = p.arrived.Load()-at, int(u.here), int(u.bad.Load())
	for i := range x.Frames {
		s.Chunks += len(x.Frames[i].Chunks)
	}
	if s.Bad >= maxBad && err == nil {
		err = ErrBadPack
	}
	q.log.Debug("startup pack", "bytes", s.Bytes, "chunks", s.Chunks, "here", s.Here, "bad", s.Bad, "took", time.Since(begun), "err", err)
	return s, err
}

var errNotPacked = errors.New("it did not come with the startup pack")

// An unpacking is one call of Pack.
type unpacking struct {
	q    *Queue
	p    *packed
	work sync.WaitGroup
	here int
	bad  atomic.Int32
}

// expect registers the frames that have something that is not here, so that reads wait for them. Others are nil.
func (q *Queue) expect(x *pack.Index, p *packed, at int64, u *unpacking) []*flight {
	flights := make([]*flight, len(x.Frames))
	for i := range x.Frames {
		frame := &x.Frames[i]
		at += int64(frame.Size)
		f := &flight{frame: frame, pack: p, end: at, done: make(chan struct{})}
		missing := 0
		for _, c := range frame.Chunks {
			o, err := q.Open(1<<63 | c.Object>>1)
			if err != nil {
				missing++ // unknown: it shows when it is unpacked
				continue
			}
			if c.Index >= o.table().NumChunks() || !o.has(c.Index) {
				missing++
			}
			o.Close()
		}
		u.here += len(frame.Chunks) - missing
		if missing > 0 {
			flights[i] = f
		}
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, f := range flights {
		if f == nil {
			continue
		}
		for _, c := range f.frame.Chunks {
			id := packID{1<<63 | c.Object>>1, c.Index}
			if q.packs[id] == nil {
				q.packs[id] = f
			}
		}
	}
	return flights
}

// skip is how many bytes of a pack that are not needed are read rather than asked around.
const skip = 1 << 20

// read reads the frames and has them unpacked. It sets to nil what it has taken care of.
func (u *unpacking) read(ctx context.Context, x *pack.Index, at int64, open func(context.Context, int64) (io.ReadCloser, error), flights []*flight) error {
	var body io.ReadCloser
	defer func() {
		if body != nil {
			body.Close()
		}
	}()
	pos := at // of body
	for i, f := range flights {
		size := int64(x.Frames[i].Size)
		begin := at
		at += size
		if f == nil {
			continue
		}
		if body != nil && begin-pos > skip {
			body.Close()
			body = nil
		}
		if body == nil {
			var err error
			if body, err = open(ctx, begin); err != nil {
				return err
			}
			pos = begin
		}
		if _, err := io.CopyN(io.Discard, body, begin-pos); err != nil {
			return fmt.Errorf("startup pack: at byte %d: %w", pos, noEOF(err))
		}
		b := buffers.get(int(size))
		if err := u.fill(body, b, begin); err != nil {
			return fmt.Errorf("startup pack: at byte %d: %w", begin, noEOF(err))
		}
		pos = at
		if u.bad.Load() >= maxBad {
			return ErrBadPack
		}
		flights[i] = nil
		select {
		case u.q.decoders <- struct{}{}:
		case <-ctx.Done():
			u.q.landed(f, context.Cause(ctx))
			return context.Cause(ctx)
		}
		u.work.Go(func() {
			defer func() { <-u.q.decoders }()
			err := u.q.unpack(f, b)
			buffers.put(b)
			if err != nil {
				u.bad.Add(1)
			}
			u.q.landed(f, err)
		})
	}
	return nil
}

// fill reads a frame and counts what arrives.
func (u *unpacking) fill(body io.Reader, b []byte, begin int64) error {
	u.p.arrived.Store(begin)
	for n := 0; n < len(b); {
		m, err := body.Read(b[n:])
		n += m
		u.p.arrived.Add(int64(m))
		u.q.fetched.Add(int64(m))
		u.q.Touch()
		if err != nil && n < len(b) {
			return err
		}
	}
	return nil
}

// unpack verifies what is in a frame against the layers' tables, as [Queue.land] does for members, and stores it.
func (q *Queue) unpack(f *flight, b []byte) error {
	buf := buffers.get(f.frame.Inflated)
	defer buffers.put(buf)
	data, err := f.frame.Inflate(b, buf)
	if err != nil {
		return err
	}
	for _, c := range f.frame.Chunks {
		n, err := q.unpackChunk(f, c, data)
		if err != nil {
			return err
		}
		data = data[n:]
	}
	return nil
}

func (q *Queue) unpackChunk(f *flight, c pack.Chunk, data []byte) (int64, error) {
	o, err := q.Open(1<<63 | c.Object>>1)
	if err != nil {
		return 0, fmt.Errorf("startup pack: object %x: %w", c.Object, err)
	}
	defer o.Close()
	t := o.table()
	if c.Index < 0 || c.Index >= t.NumChunks() {
		return 0, fmt.Errorf("startup pack: object %v has no chunk %d", t.Key, c.Index)
	}
	chunk, _ := t.Chunk(c.Index)
	if chunk.Hole || chunk.Size > int64(len(data)) {
		return 0, fmt.Errorf("startup pack: chunk %d of object %v is not in its frame", c.Index, t.Key)
	}
	p := data[:chunk.Size]
	if o.has(c.Index) {
		return chunk.Size, nil
	}
	if sum := sha256.Sum256(p); sum != chunk.Digest {
		return 0, fmt.Errorf("startup pack: chunk %d of object %v is %v, not %v as the TOC says", c.Index, t.Key, toc.Digest(sum), chunk.Digest)
	}
	if err := o.put(c.Index, p); err != nil {
		f.lost = err
		f.keep(o.key, c.Index, append([]byte(nil), p...))
		q.fullStore(err)
	}
	return chunk.Size, nil
}

// landed ends the flight of a frame.
func (q *Queue) landed(f *flight, err error) {
	f.err = err
	q.mu.Lock()
	for _, c := range f.frame.Chunks {
		if id := (packID{1<<63 | c.Object>>1, c.Index}); q.packs[id] == f {
			delete(q.packs, id)
		}
	}
	if f.waiters.Load() == 0 {
		f.data = nil
	}
	q.mu.Unlock()
	close(f.done)
}

// joinPack returns the flight of the frame that brings chunk i of the object with one more waiter, or nil if none does, or not
// soon.
func (q *Queue) joinPack(key store.Key, i int) *flight {
	q.mu.Lock()
	defer q.mu.Unlock()
	f := q.packs[packID{id(key), i}]
	if f == nil {
		return nil
	}
	if _, soon := f.pack.soon(f.end); !soon {
		return nil
	}
	f.waiters.Add(1)
	return f
}

// expected reports whether a startup pack brings chunk i of the object.
func (q *Queue) expected(key store.Key, i int) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.packs[packID{id(key), i}] != nil
}

// waitPack waits for the frame of a startup pack, and reports whether it came: not if something else will be faster.
func (f *flight) waitPack(ctx context.Context) bool {
	patience, _ := f.pack.soon(f.end)
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-f.done:
		return f.err == nil
	case <-timer.C:
	case <-ctx.Done():
	}
	return false
}
