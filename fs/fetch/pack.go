package fetch

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
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

// A packed is a startup pack that is arriving. Its bytes are counted as those of the frames that are read, in their order.
type packed struct {
	begun   time.Time
	arrived atomic.Int64
	latest  atomic.Int64 // when bytes came last, in nanoseconds from begun
	late    atomic.Int64 // the end of the furthest frame that was waited for in vain
	vain    atomic.Int32 // how often late grew

	link *link
	rate atomic.Int64 // bytes a second, of late; 0 is not known yet
	// Of who reads the pack: when rate was found, arrived at that time, and the bytes a second since the time before.
	mark         time.Time
	marked, last int64
	// Reads that waited for it and were right, and requests of reads, while it came, for what it has much later, or not.
	met, far, lacking atomic.Int32
}

const (
	// packPatience is for how long a read waits for a pack rather than for an answer of its own: some round trips of most links.
	packPatience = 150 * time.Millisecond
	// maxVain is how often reads wait for a pack in vain before none does any more: what a pack can cost is maxVain times three
	// packPatience, however it comes in.
	maxVain = 3
	// packStall is for how long a pack may bring nothing before misses beside it are taken to be those of a start without: a packet that is lost
	// costs two round trips or more.
	packStall = 4 * packPatience
	// fastPack is how many bytes a second are enough for a pack to be waited for, whatever the link could carry: at 20 ms and 1 Gbit/s
	// a start without a pack comes to no more of what it needs. While nobody knows what the link carries, half of that is enough.
	fastPack = 8 << 20
	// A pack is given up if, after packTrial, maxFar requests more than reads had waited for it were sent for what it has packTrial later, or maxLacking
	// for what it has not: one that has what is wanted in about the right order is here by then, or is what reads wait for.
	packTrial  = time.Second
	maxFar     = 4
	maxLacking = 24
)

// moving reports whether the pack brings something, and reads do not wait in vain for it, nor longer than if they asked.
func (p *packed) moving() bool {
	return p.vain.Load() < maxVain && p.idle() < packPatience && p.fast()
}

// idle returns for how long the pack has brought nothing.
func (p *packed) idle() time.Duration {
	return time.Since(p.begun) - time.Duration(p.latest.Load())
}

// fast reports whether the pack comes fast, or not much slower than other answers do. If it is slow and that is not known, reads ask, and then it is.
func (p *packed) fast() bool {
	rate, speed := p.rate.Load(), p.link.speed()
	return rate == 0 || rate >= fastPack || speed > 0 && rate > speed/2 || speed == 0 && rate >= fastPack/2
}

// near reports whether what ends at byte end is here in packTrial, at the speed of late; it is if that is not known yet.
func (p *packed) near(end int64) bool {
	rate := p.rate.Load()
	return rate == 0 || float64(end-p.arrived.Load()) <= float64(rate)*packTrial.Seconds()
}

// useless reports whether reads want something else than what comes, and have the link to share with it.
func (p *packed) useless() bool {
	met := p.met.Load()
	return (p.far.Load() > met+maxFar || p.lacking.Load() > met+maxLacking) && time.Since(p.begun) > packTrial
}

// soon returns for how long to wait for what ends at byte end, and whether that is worth it: if not, asking for it is
// faster.
func (p *packed) soon(end int64) (time.Duration, bool) {
	arrived := p.arrived.Load()
	switch {
	case arrived >= end:
		return packPatience, true // it is being unpacked
	case !p.moving(), end <= p.late.Load():
		return 0, false
	case arrived == 0:
		return packPatience, true
	}
	// At the speed so far, which is less than the speed now while a connection grows.
	wait := time.Duration(float64(time.Since(p.begun)) * float64(end-arrived) / float64(arrived))
	return packPatience + 2*wait, wait < packPatience
}

// missed notes that what ends at byte end was waited for in vain.
func (p *packed) missed(end int64) {
	for late := p.late.Load(); end > late && end > p.arrived.Load(); late = p.late.Load() {
		if p.late.CompareAndSwap(late, end) {
			p.vain.Add(1)
			return
		}
	}
}

// came notes that so many bytes are here.
func (p *packed) came(arrived int64) {
	now := time.Now()
	stalled := p.idle() >= packStall
	p.arrived.Store(arrived)
	p.latest.Store(int64(now.Sub(p.begun)))
	if p.mark.IsZero() {
		p.mark = p.begun
	}
	d := now.Sub(p.mark)
	rate := max(int64(float64(arrived-p.marked)/d.Seconds()), 1)
	switch {
	case stalled: // what came before says nothing
		rate = 1
		p.rate.Store(rate)
	case d >= 2*packPatience:
		p.rate.Store(max(rate, p.last)) // a packet that is lost holds up the others
	default:
		return
	}
	p.mark, p.marked, p.last = now, arrived, rate
}

const (
	// packHold is for how long a pack keeps fills off the link: a pack that never ends must not do so for ever.
	packHold = time.Minute
	// packTime is how long a pack may take: what has not come until then is of no use to a start.
	packTime = 10 * time.Minute
)

// PackStats says what came of a startup pack.
type PackStats struct {
	Bytes   int64 // of its frames that arrived
	Chunks  int   // that it has
	Here    int   // of those, that were in the store already
	Foreign int   // of objects that no layer has
	Bad     int   // frames that were not what the tables of contents say, or had unknown objects
}

const (
	// maxBad is how many frames of a pack may be bad, or not be taken by the store, before the rest is not looked at.
	maxBad = 8
	// packTries is how often a pack is asked for when its stream breaks.
	packTries = 3
	// skip is how many bytes of a pack that are not needed are read rather than asked around.
	skip = 1 << 20
	// maxSkip is how many are read in all before the pack is given up. Asking around counts as skip.
	maxSkip = 64 << 20
)

// ErrBadPack says that a startup pack was given up because of what was in it.
var ErrBadPack = errors.New("the startup pack is not of this image, or damaged")

// ErrUseless says that a startup pack was given up because a start reads something else than what is in it.
var ErrUseless = errors.New("the startup pack was given up: the start reads something else")

var (
	errNotPacked = errors.New("it did not come with the startup pack")
	errScattered = errors.New("the startup pack was given up: what is wanted of it lies scattered in it")
	errFullStore = errors.New("the startup pack was given up: the store does not take what it brings")
)

// Pack takes the frames of a startup pack into the store. open returns the pack from byte off on; at is where its first frame begins.
// layers are those that it has chunks of, and were added. Chunks that are in it are not asked for otherwise while they are expected soon. What is
// here, or comes with another pack, is not read again. Nothing is believed: frames that cannot be what they say are not even read, what does not
// verify is dropped, and a pack that has too much of it is given up with [ErrBadPack]. Unless it is a guess, of which nobody has seen that
// a start reads it and nothing else, what it lacks is taken to be single: misses have no neighbours fetched. It is given up with [ErrUseless] when reads ask for other things meanwhile.
func (q *Queue) Pack(ctx context.Context, x *pack.Index, at int64, open func(ctx context.Context, off int64) (io.ReadCloser, error), guess bool, layers ...*Layer) (PackStats, error) {
	q.mu.Lock()
	if q.closed {
		q.mu.Unlock()
		return PackStats{}, errClosed
	}
	q.work.Add(1) // Close waits for us
	q.mu.Unlock()
	defer q.work.Done()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(q.ctx, func() { cancel(errClosed) })()
	ctx, stop := context.WithTimeoutCause(ctx, packTime, fmt.Errorf("it has not come within %v", packTime))
	defer stop()

	mark := func(packed bool) {
		for _, l := range layers {
			if !guess {
				l.packed.Store(packed)
			}
		}
	}
	free := q.holdFills()
	defer free()
	defer time.AfterFunc(packHold, free).Stop()
	begun := time.Now()
	u := &unpacking{q: q, layers: layers, x: x, at: at, open: open, p: &packed{begun: begun, link: &q.link}}
	err := u.expect()
	if err == nil {
		for _, l := range layers {
			l.arriving.Store(u.p)
		}
		// Of another build: what has changed since is read as if there were no pack, unless the pack says where it lies.
		mark(u.foreign == 0 || x.Paths != nil)
		u.p.latest.Store(int64(time.Since(begun))) // the network has had no time yet
		err = u.read(ctx)
	}
	for _, f := range u.flights { // those that did not come
		if f != nil {
			q.landed(f, errors.Join(err, errNotPacked))
		}
	}
	u.work.Wait()
	for _, l := range layers {
		l.arriving.CompareAndSwap(u.p, nil)
	}
	s := PackStats{Bytes: u.p.arrived.Load(), Here: u.here, Bad: int(u.bad.Load())}
	s.Chunks, s.Foreign = u.chunks(), u.foreign
	if s.Bad >= maxBad && err == nil {
		err = ErrBadPack
	}
	if err != nil || s.Bad > 0 {
		mark(false) // what it lacks is read as if there had been none
	}
	q.log.Debug("startup pack", "bytes", s.Bytes, "chunks", s.Chunks, "here", s.Here, "foreign", s.Foreign, "bad", s.Bad, "took", time.Since(begun), "err", err)
	return s, err
}

// An unpacking is one call of Pack.
type unpacking struct {
	q       *Queue
	layers  []*Layer
	x       *pack.Index
	at      int64 // of the first frame
	open    func(ctx context.Context, off int64) (io.ReadCloser, error)
	p       *packed
	flights []*flight // of the frames, in their order; nil for those that are not needed, or are taken care of
	here    int       // chunks
	foreign int       // chunks of objects that no layer has
	size    int64     // bytes of the frames that are needed, inflated
	wanted  int64     // of these, that are of chunks that are not here
	skipped int64     // bytes that were read over, or asked around

	work      sync.WaitGroup
	bad, lost atomic.Int32 // frames that are not what they say, or are not taken by the store
}

// expect registers the frames that have something that is neither here nor comes with another pack, so that reads wait for them.
func (u *unpacking) expect() error {
	q := u.q
	u.flights = make([]*flight, len(u.x.Frames))
	end := int64(0)
	for i := range u.x.Frames {
		f := &flight{frame: &u.x.Frames[i], pack: u.p, done: make(chan struct{})}
		missing, foreign, err := q.missing(f.frame)
		if err != nil {
			q.log.Debug("startup pack", "frame", i, "err", err)
			if u.bad.Add(1) >= maxBad {
				return ErrBadPack
			}
			continue
		}
		u.foreign += foreign
		u.here += len(f.frame.Chunks) - len(missing) - foreign
		if u.claim(f, missing) {
			end += int64(f.frame.Size)
			f.end = end
			u.flights[i] = f
		}
	}
	if 2*u.foreign > u.chunks() {
		return ErrBadPack
	}
	return nil
}

func (u *unpacking) chunks() (n int) {
	for i := range u.x.Frames {
		n += len(u.x.Frames[i].Chunks)
	}
	return n
}

// claim has reads wait for a frame, for those of the chunks missing that come with no other, and reports whether it is to be fetched. It is not if that
// made these chunks less than half of all bytes that are fetched: so nobody can have more fetched than twice what the layers have.
func (u *unpacking) claim(f *flight, missing []pack.Chunk) bool {
	q := u.q
	q.mu.Lock()
	defer q.mu.Unlock()
	wanted := int64(0)
	for _, c := range missing {
		id := idOf(c)
		if other := q.packs[id]; other == nil || other.pack != u.p && !other.pack.moving() {
			q.packs[id] = f
			wanted += int64(c.Size)
		}
	}
	size := u.size + int64(f.frame.Inflated)
	if wanted == 0 || 2*(u.wanted+wanted) < size {
		q.unclaim(f)
		return false
	}
	u.size, u.wanted = size, u.wanted+wanted
	return true
}

// unclaim has no read wait for a frame any more. The caller holds q.mu.
func (q *Queue) unclaim(f *flight) {
	for _, c := range f.frame.Chunks {
		if id := idOf(c); q.packs[id] == f {
			delete(q.packs, id)
		}
	}
}

func idOf(c pack.Chunk) packID { return packID{1<<63 | c.Object>>1, c.Index} }

// missing returns the chunks of a frame that are not here, or an error if the tables of contents say that the frame cannot be
// what it claims. foreign are the chunks of objects that no layer has: the pack may be of another
// build of the image.
func (q *Queue) missing(frame *pack.Frame) (list []pack.Chunk, foreign int, err error) {
	size := int64(0)
	for _, c := range frame.Chunks {
		size += int64(c.Size)
		o, chunk, err := q.openPacked(c)
		if errors.Is(err, fs.ErrNotExist) {
			foreign++
			continue
		}
		if err != nil {
			return nil, 0, err
		}
		if int64(c.Size) != chunk.Size {
			o.Close()
			return nil, 0, fmt.Errorf("startup pack: chunk %d of object %v has %d bytes, not %d", c.Index, o.key, chunk.Size, c.Size)
		}
		if !o.has(c.Index) {
			list = append(list, c)
		}
		o.Close()
	}
	if size != int64(frame.Inflated) {
		return nil, 0, fmt.Errorf("startup pack: a frame of %d bytes for chunks of %d", frame.Inflated, size)
	}
	return list, foreign, nil
}

// openPacked opens the object that a pack's chunk is of, and returns what its layer's table says of the chunk. The caller closes it.
func (q *Queue) openPacked(c pack.Chunk) (*Object, toc.Chunk, error) {
	o, err := q.Open(idOf(c).object)
	if err != nil {
		return nil, toc.Chunk{}, fmt.Errorf("startup pack: object %x: %w", c.Object, err)
	}
	t := o.table()
	if o.first().layer.Table.Compression() == toc.Whole { // whose objects are put whole, or not at all
		o.Close()
		return nil, toc.Chunk{}, fmt.Errorf("startup pack: object %v is of a layer that is not lazy", t.Key)
	}
	if c.Index < 0 || c.Index >= t.NumChunks() {
		o.Close()
		return nil, toc.Chunk{}, fmt.Errorf("startup pack: object %v has no chunk %d", t.Key, c.Index)
	}
	chunk, _ := t.Chunk(c.Index)
	if chunk.Hole {
		o.Close()
		return nil, toc.Chunk{}, fmt.Errorf("startup pack: chunk %d of object %v is a hole", c.Index, t.Key)
	}
	return o, chunk, nil
}

// read reads the frames that are needed and has them unpacked.
func (u *unpacking) read(ctx context.Context) error {
	body := &packBody{u: u}
	defer body.close()
	begin, tries := u.at, 1
	for i, f := range u.flights {
		off := begin
		begin += int64(u.x.Frames[i].Size)
		if f == nil {
			continue
		}
		b := buffers.get(f.frame.Size)
		for {
			err := body.fill(ctx, b, off, f.end)
			if err == nil {
				break
			}
			body.close()
			if tries++; ctx.Err() != nil || tries > packTries || errors.Is(err, errScattered) || errors.Is(err, ErrUseless) {
				buffers.put(b)
				return fmt.Errorf("startup pack: at byte %d: %w", off, cmp.Or(context.Cause(ctx), err))
			}
		}
		switch {
		case u.bad.Load() >= maxBad:
			return ErrBadPack
		case u.lost.Load() >= maxBad:
			return errFullStore
		case !slices.ContainsFunc(u.layers, func(l *Layer) bool { return l.ctx.Err() == nil }):
			return errRemoved
		}
		select {
		case u.q.decoders <- struct{}{}:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		u.flights[i] = nil
		u.work.Go(func() {
			defer func() { <-u.q.decoders }()
			err := u.q.unpack(f, b)
			buffers.put(b)
			if err != nil {
				u.q.log.Debug("startup pack", "frame", i, "err", err)
				u.bad.Add(1)
			} else if f.lost != nil {
				u.lost.Add(1)
			}
			u.q.landed(f, err)
		})
	}
	return nil
}

// A packBody is the stream of a pack.
type packBody struct {
	u *unpacking
	io.ReadCloser
	pos int64 // where it is in the pack
}

func (b *packBody) close() {
	if b.ReadCloser != nil {
		b.ReadCloser.Close()
		b.ReadCloser = nil
	}
}

// fill reads p at byte off of the pack, which comes behind what was read so far. end is where p ends in bytes of the frames that are read.
func (b *packBody) fill(ctx context.Context, p []byte, off, end int64) error {
	if b.ReadCloser != nil {
		if b.u.skipped += min(off-b.pos, skip); b.u.skipped > maxSkip {
			return errScattered
		}
		if off-b.pos > skip {
			b.close()
		}
	}
	if b.ReadCloser == nil {
		b.u.q.requests.Add(1)
		body, err := b.u.open(ctx, off)
		if err != nil {
			return err
		}
		b.ReadCloser, b.pos = body, off
	}
	n, err := io.CopyN(io.Discard, b.ReadCloser, off-b.pos)
	b.pos += n
	b.u.q.fetched.Add(n)
	if err != nil {
		return noEOF(err)
	}
	for n := 0; n < len(p); {
		if b.u.p.useless() {
			return ErrUseless
		}
		m, err := b.Read(p[n:])
		n += m
		b.pos += int64(m)
		b.u.q.fetched.Add(int64(m))
		if m > 0 {
			b.u.p.came(end - int64(len(p)-n))
			b.u.q.Touch()
		}
		if err != nil && n < len(p) {
			return noEOF(err)
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
	o, chunk, err := q.openPacked(c)
	if errors.Is(err, fs.ErrNotExist) && c.Size <= len(data) {
		return int64(c.Size), nil
	}
	if err != nil {
		return 0, err
	}
	defer o.Close()
	if chunk.Size > int64(len(data)) { // another layer says so than the one that was asked first
		return 0, fmt.Errorf("startup pack: chunk %d of object %v is not in its frame", c.Index, o.key)
	}
	if o.has(c.Index) {
		return chunk.Size, nil
	}
	p := data[:chunk.Size]
	if sum := sha256.Sum256(p); sum != chunk.Digest {
		return 0, fmt.Errorf("startup pack: chunk %d of object %v is %v, not %v as the TOC says", c.Index, o.key, toc.Digest(sum), chunk.Digest)
	}
	if err := o.put(c.Index, p); err != nil {
		f.lost = err
		f.keep(o.key, c.Index, bytes.Clone(p))
		q.fullStore(err)
	}
	return chunk.Size, nil
}

// landed ends the flight of a frame.
func (q *Queue) landed(f *flight, err error) {
	f.err = err
	q.mu.Lock()
	q.unclaim(f)
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

// wants notes that a request is sent for chunk i of the object while the layer's startup pack arrives.
func (q *Queue) wants(l *Layer, key store.Key, i int) {
	p := l.arriving.Load()
	if p == nil {
		return
	}
	q.mu.Lock()
	f := q.packs[packID{id(key), i}]
	q.mu.Unlock()
	switch {
	case f == nil || f.pack != p:
		p.lacking.Add(1)
	case !p.near(f.end):
		p.far.Add(1)
	}
}

// hasPack reports whether a startup pack has brought what a start wants of the layer, or brings it.
func (l *Layer) hasPack() bool {
	p := l.arriving.Load()
	return l.packed.Load() && (p == nil || p.idle() < packStall && p.fast())
}

// expected reports whether a startup pack brings chunk i of the object, soon or not so soon.
func (q *Queue) expected(key store.Key, i int) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	f := q.packs[packID{id(key), i}]
	return f != nil && f.pack.moving()
}

// packed reports whether chunks first to last of the object are what a startup pack has brought, or brings: the start that it was made of has
// not read on from there, or the pack would have that too.
func (o *Object) packed(src source, first, last int) bool {
	if !src.layer.hasPack() {
		return false
	}
	for i := first; i <= last; i++ {
		if !o.has(i) && !o.q.expected(o.key, i) {
			return false
		}
	}
	return true
}

// waitPack waits for the frame of a startup pack, and reports whether it came: not if something else will be faster.
func (f *flight) waitPack(ctx context.Context) bool {
	patience, _ := f.pack.soon(f.end)
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-f.done:
		if f.err == nil {
			f.pack.met.Add(1)
		}
		return f.err == nil
	case <-timer.C:
		f.pack.missed(f.end)
	case <-ctx.Done():
	}
	return false
}
