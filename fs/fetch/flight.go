package fetch

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"lazuli/fs/pack"
	"lazuli/fs/store"
	"lazuli/fs/toc"
)

// A priority says how much a run matters.
type priority int

const (
	background priority = iota // the rest of an image
	ahead                      // what a reader is going to want
	demand                     // somebody waits
)

// A flight is one member on its way. It is in Queue.flights from before its bytes are asked for
// until they are in the store, so that nobody asks for them twice.
type flight struct {
	id   memberID
	refs []toc.Ref
	run  *run
	done chan struct{}
	err  error // set before done is closed
	// last is why the latest attempt failed, until then: more are made than most readers wait for.
	last atomic.Pointer[error]

	// data has the chunks that the store did not take, and lost says why it did not. Both are set before done is closed.
	data map[chunkID][]byte
	lost error

	// Of the flight of a startup pack's frame, which has neither id nor refs nor run:
	frame *pack.Frame
	pack  *packed
	end   int64 // of the frame, in bytes of the pack

	// Under Queue.mu:
	asked   bool    // a reader wants it
	arrived bool    // its bytes are here
	parked  *parked // they are parked

	wanted bool // by a call of Ahead: it is not parked

	waiters atomic.Int32 // leave 0 only under Queue.mu
	tries   int          // by the goroutine that decodes
}

type chunkID struct {
	key   store.Key
	chunk int
}

// A run is neighbouring members that are fetched in one request.
type run struct {
	priority priority
	parks    bool          // what nobody waits for when it arrives is not decoded yet
	promoted chan struct{} // closed when somebody waits for one of the flights
	once     sync.Once
}

func (r *run) promote() { r.once.Do(func() { close(r.promoted) }) }

// urgent reports whether somebody waits for the run.
func (r *run) urgent() bool {
	select {
	case <-r.promoted:
		return true
	default:
		return r.priority == demand
	}
}

// wait returns when the flight has ended, or ctx.
func (f *flight) wait(ctx context.Context) error {
	select {
	case <-f.done:
		return f.err
	case <-ctx.Done():
		if last := f.last.Load(); last != nil {
			return fmt.Errorf("%w: %w", context.Cause(ctx), *last)
		}
		return context.Cause(ctx)
	}
}

// chunk returns the bytes of a chunk, if the flight, which has ended, kept them.
func (f *flight) chunk(key store.Key, i int) []byte { return f.data[chunkID{key, i}] }

func (f *flight) keep(key store.Key, i int, p []byte) {
	if f.data == nil {
		f.data = map[chunkID][]byte{}
	}
	f.data[chunkID{key, i}] = p
}

// release takes back one waiter.
func (f *flight) release() { f.waiters.Add(-1) }

// demand returns the flights that bring chunks first to last of o from src, nil for chunks that are here,
// and begins those that are not under way. The caller releases them. usePack says that a startup pack may bring them.
func (q *Queue) demand(o *Object, src source, first, last int, usePack bool) []*flight {
	flights := make([]*flight, last-first+1)
	l := src.layer
	waits := false // for the network
	defer func() {
		if waits {
			q.misses.Add(1)
		}
	}()
	for i := first; i <= last; i++ {
		_, m := src.object.Chunk(i)
		if m < 0 || flights[i-first] != nil || o.has(i) {
			continue
		}
		if usePack {
			if flights[i-first] = q.joinPack(o.key, i); flights[i-first] != nil {
				waits = true
				continue
			}
		}
		var arrived bool
		if flights[i-first], arrived = q.join(l, m); flights[i-first] != nil {
			waits = waits || !arrived
			continue
		}
		if l.members[m].Load() {
			// It was here once: since then it came back, or the object was removed from the store.
			if o.has(i) {
				continue
			}
			l.members[m].Store(false)
		}
		to := m + 1 // how far the members that are asked for reach without a gap
		for j := i + 1; j <= last; j++ {
			if _, next := src.object.Chunk(j); next == to && !o.has(j) {
				to++
			}
		}
		waits = true
		q.wants(l, o.key, i)
		for _, f := range q.startMiss(src, m, to) {
			if f.id.member >= to {
				break
			}
			for j := i; j <= last; j++ {
				if _, member := src.object.Chunk(j); member == f.id.member && flights[j-first] == nil {
					f.waiters.Add(1)
					flights[j-first] = f
				}
			}
			f.release() // startRun's
		}
		if flights[i-first] == nil { // somebody else began it meanwhile; nil if it arrived too
			flights[i-first], _ = q.join(l, m)
		}
	}
	return flights
}

// join returns the flight of a member with one more waiter, or nil if there is none, and whether its bytes have arrived.
func (q *Queue) join(l *Layer, m int) (f *flight, arrived bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	f = q.flights[memberID{l, m}]
	if f != nil {
		f.waiters.Add(1)
		f.run.promote()
		q.wake(f)
		q.ask(f)
		arrived = f.arrived
	}
	return f, arrived
}

// flying reports whether chunk i of the source's object is on its way.
func (q *Queue) flying(src source, i int) bool {
	_, m := src.object.Chunk(i)
	return q.onItsWay(src.layer, m)
}

// maxRest is how many bytes of a blob are fetched to have the rest of a file with the piece that is asked for.
const maxRest = 2 << 20

// restOf returns how many bytes of the blob lie between member to and the end of the source's object, or 0 if they are
// too many.
func restOf(src source, to int) int64 {
	_, last := src.object.Chunk(src.object.NumChunks() - 1)
	if last < to {
		return 0
	}
	start, _ := src.layer.Table.Member(to)
	_, end := src.layer.Table.Member(last)
	if end-start > maxRest {
		return 0
	}
	return end - start
}

// window returns how many bytes of the blob to fetch beyond members first to end-1, for which somebody is going to wait.
func (q *Queue) window(l *Layer, first, end int) int64 {
	const near = 8 // members that a reader may skip and still be going forward
	q.mu.Lock()
	defer q.mu.Unlock()
	for i := range l.streams {
		s := &l.streams[i]
		if s.window > 0 && first >= s.next && first < s.next+near {
			s.window = min(max(2*s.window, firstWindow/8), maxWindow)
			s.next = l.memberAt(end, s.window)
			return s.window
		}
	}
	window := q.link.window()
	if l.hasPack() {
		// What a start wants has come. What is missing is single, unless it turns out to be read in sequence.
		window = 1
	}
	l.streams[l.turn] = stream{l.memberAt(end, window), window}
	l.turn = (l.turn + 1) % len(l.streams)
	return window
}

// startMiss begins to fetch members m to to-1 of the source's layer, for which somebody is going to wait, and what lies around them within the window. It
// returns their flights, and those of what lies behind them, as startRun does.
func (q *Queue) startMiss(src source, m, to int) []*flight {
	l := src.layer
	start, _ := l.Table.Member(m)
	_, end := l.Table.Member(to - 1)
	window := q.window(l, m, to)
	if !l.hasPack() { // else what a start wants of the rest comes with the pack, or came
		window = max(window, restOf(src, to))
	}
	begun, next := q.startRun(l, m, l.Table.NumMembers(), end-start+window, demand, to)
	if len(begun) > 0 && next < l.Table.NumMembers() && q.had(l, next) {
		reached, _ := l.Table.Member(next)
		q.startBefore(l, begun[0].id.member, end+window-reached)
	}
	return begun
}

// startBefore begins to fetch the members before m that are neither here nor on their way, about size bytes of the blob from the last that
// is, in a request of its own, so that who waits for m does not wait for them: where what lies behind a miss is here, the reader is going backwards.
func (q *Queue) startBefore(l *Layer, m int, size int64) {
	end, _ := l.Table.Member(m)
	first := m
	for first > 0 {
		if start, _ := l.Table.Member(first - 1); end-start > size || q.had(l, first-1) {
			break
		}
		first--
	}
	if first < m {
		q.startRun(l, first, m, size, demand, 0)
	}
}

// had reports whether a member is here or on its way.
func (q *Queue) had(l *Layer, m int) bool { return q.onItsWay(l, m) || q.seen(l, m) }

func (q *Queue) onItsWay(l *Layer, m int) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.flights[memberID{l, m}] != nil
}

// memberAt returns the member that begins n bytes of the blob behind the beginning of member m.
func (l *Layer) memberAt(m int, n int64) int {
	if m >= l.Table.NumMembers() {
		return m
	}
	start, _ := l.Table.Member(m)
	for m < l.Table.NumMembers() {
		if _, end := l.Table.Member(m); end > start+n {
			break
		}
		m++
	}
	return m
}

// ahead begins to fetch chunks first to last of the source's object.
func (q *Queue) ahead(src source, first, last int) {
	for i := first; i <= last; i++ {
		_, m := src.object.Chunk(i)
		if m < 0 || q.expected(store.Key(src.object.Key), i) {
			continue
		}
		end := m + 1
		for i < last {
			_, next := src.object.Chunk(i + 1)
			if next != end-1 && next != end {
				break
			}
			end = next + 1
			i++
		}
		q.mu.Lock()
		for x := m; x < end; x++ { // it is wanted now
			if f := q.flights[memberID{src.layer, x}]; f != nil {
				q.wake(f)
			}
		}
		q.mu.Unlock()
		for m < end {
			_, m = q.startRun(src.layer, m, end, maxRun, ahead, 0)
		}
	}
}

// startRun begins to fetch the members of l from m on that are neither here nor on their
// way: the first such member, and those that follow it without a gap, before end and within about size bytes of the
// blob. It returns their flights and the member behind them. Flights of members before wanted have one waiter from the beginning, so that
// what they bring is not dropped before the caller joins them.
func (q *Queue) startRun(l *Layer, m, end int, size int64, p priority, wanted int) ([]*flight, int) {
	for m < end && q.seen(l, m) {
		m++
	}
	if m == end {
		return nil, m
	}
	// Whether a member is here is asked without the lock, since the answer may need the disk.
	limit, _ := l.Table.Member(m)
	limit += size
	last := m + 1
	for last < end {
		if _, e := l.Table.Member(last); e > limit || q.seen(l, last) {
			break
		}
		last++
	}
	r := &run{priority: p, parks: p == demand, promoted: make(chan struct{})}
	var flights []*flight
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return nil, end
	}
	for ; m < last; m++ {
		id := memberID{l, m}
		// A flight that ended since we asked has marked its member before it left the map.
		if q.flights[id] != nil || l.members[m].Load() {
			if len(flights) > 0 {
				break
			}
			continue
		}
		f := &flight{id: id, refs: l.Table.MemberRefs(m), run: r, done: make(chan struct{})}
		if p != background {
			start, end := l.Table.Member(m)
			l.density.brought += end - start
		}
		if m < wanted {
			f.waiters.Store(1)
			q.ask(f)
		}
		q.flights[id] = f
		flights = append(flights, f)
	}
	if len(flights) > 0 {
		q.work.Go(func() { q.fly(r, flights) })
	}
	return flights, m
}

// seen reports whether everything in a member is in the store.
func (q *Queue) seen(l *Layer, m int) bool {
	if l.members[m].Load() {
		return true
	}
	for _, ref := range l.Table.MemberRefs(m) {
		if q.store.Has(store.Key(ref.Object.Key)) {
			continue
		}
		if ref.Object.NumChunks() == 1 {
			return false
		}
		o, err := q.Open(id(store.Key(ref.Object.Key)))
		if err != nil {
			return false
		}
		here := o.has(ref.Chunk)
		o.Close()
		if !here {
			return false
		}
	}
	l.members[m].Store(true)
	return true
}

// fly brings the flights of a run, which are neighbours or nearly so. Each of them ends, whatever happens.
func (q *Queue) fly(r *run, flights []*flight) {
	// A Blob asks again by itself while its registry does not answer. Here, streams that break are gone on with.
	const maxAttempts = 6
	ctx := flights[0].id.layer.ctx
	for attempt := 1; ; attempt++ {
		arrived, err := q.request(ctx, r, flights)
		flights = flights[arrived:]
		if len(flights) == 0 {
			return
		}
		failed := err
		for _, f := range flights {
			f.last.Store(&failed)
		}
		if arrived > 0 {
			attempt = 1
		}
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		if attempt == maxAttempts || ctx.Err() != nil {
			for _, f := range flights {
				q.finish(f, err)
			}
			return
		}
		select {
		case <-time.After(retryDelay(attempt)):
		case <-ctx.Done():
		}
	}
}

// request asks for the span of some neighbouring flights, in one range request, and hands each to a
// decoder when its bytes are in. It returns for how many they came.
func (q *Queue) request(ctx context.Context, r *run, flights []*flight) (arrived int, err error) {
	slot, err := q.slot(ctx, r)
	if err != nil {
		return 0, err
	}
	defer func() { <-slot }()
	if err := q.yield(ctx, r); err != nil {
		return 0, err
	}
	l := flights[0].id.layer
	start, _ := l.Table.Member(flights[0].id.member)
	_, end := l.Table.Member(flights[len(flights)-1].id.member)
	body, err := q.stream(ctx, r, l.Blob, start, end-start)
	if err != nil {
		return 0, err
	}
	defer body.Close()
	for _, f := range flights {
		from, to := l.Table.Member(f.id.member)
		if from > start { // what lies between is here
			if _, err := io.CopyN(io.Discard, body, from-start); err != nil {
				return arrived, noEOF(err)
			}
		}
		start = to
		if to-from > maxBuffered {
			member := io.LimitReader(body, to-from)
			if err := q.land(f, member); err != nil {
				return arrived, err
			}
			q.finish(f, nil)
			arrived++
			// What the decoder did not want is read too: other members follow.
			if _, err := io.Copy(io.Discard, member); err != nil {
				return arrived, err
			}
			continue
		}
		b := buffers.get(int(to - from))
		n, err := io.ReadFull(body, b)
		if err != nil {
			buffers.put(b)
			return arrived, fmt.Errorf("at byte %d of the blob: %w", from+int64(n), noEOF(err))
		}
		arrived++
		q.parkOrLand(f, b, body)
	}
	return arrived, nil
}

// A body is the stream of one request: it counts what arrives, keeps a fill off the link while somebody waits for something
// else, and ends in an error when nothing arrives for half of a reader's patience, so that a second
// try has the other half.
type body struct {
	io.ReadCloser
	q      *Queue
	r      *run
	ctx    context.Context // of the request
	cancel context.CancelCauseFunc
	alive  *time.Timer // cancels ctx; runs while the network is waited for

	begun, first time.Time // of the request, and its first byte
	n            int64     // bytes that came
}

// stream begins the request.
func (q *Queue) stream(ctx context.Context, r *run, blob Blob, off, n int64) (*body, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	patience := q.timeout / 2
	b := &body{q: q, r: r, ctx: ctx, cancel: cancel, begun: time.Now()}
	b.alive = time.AfterFunc(patience, func() { cancel(fmt.Errorf("nothing arrived for %v", patience)) })
	q.requests.Add(1)
	var err error
	b.ReadCloser, err = blob.Range(ctx, off, n)
	b.alive.Stop()
	if err != nil {
		err = b.cause(err)
		cancel(nil)
		return nil, err
	}
	return b, nil
}

func (b *body) Read(p []byte) (int, error) {
	if err := b.q.yield(b.ctx, b.r); err != nil {
		return 0, err
	}
	b.alive.Reset(b.q.timeout / 2)
	n, err := b.ReadCloser.Read(p)
	b.alive.Stop()
	if b.n == 0 {
		b.first = time.Now()
	}
	b.n += int64(n)
	b.q.fetched.Add(int64(n))
	if b.r.priority != background || b.r.urgent() {
		b.q.Touch()
	}
	if err != nil {
		err = b.cause(err)
	}
	return n, err
}

// cause is err, or if the request was cancelled why.
func (b *body) cause(err error) error {
	if b.ctx.Err() != nil {
		return context.Cause(b.ctx)
	}
	return err
}

func (b *body) Close() error {
	defer b.cancel(nil)
	if b.n > 0 && b.r.priority != background { // which is held up
		b.q.link.answered(b.n, b.first.Sub(b.begun), time.Since(b.first))
	}
	return b.ReadCloser.Close()
}

// maxBuffered is the most compressed bytes of one member that are held in memory. Larger members, which only odd
// images have, are decoded as they arrive.
const maxBuffered = 16 << 20

// slot waits until the run may make its request, and returns where to give the slot back.
func (q *Queue) slot(ctx context.Context, r *run) (chan struct{}, error) {
	if !r.urgent() {
		slots := q.aheadSlots
		if r.priority == background {
			slots = q.fillSlots
		}
		select {
		case slots <- struct{}{}:
			return slots, nil
		case <-r.promoted:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	select {
	case q.demandSlots <- struct{}{}:
		return q.demandSlots, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// yield holds a fill back while somebody waits for something else.
func (q *Queue) yield(ctx context.Context, r *run) error {
	if r.priority != background || r.urgent() {
		return context.Cause(ctx)
	}
	return q.waitFree(ctx, r.promoted)
}

// landOrRetry decodes a member. What does not verify is fetched once more: it may have been damaged on the way.
func (q *Queue) landOrRetry(f *flight, b []byte, from *body) {
	err := q.land(f, bytes.NewReader(b))
	buffers.put(b)
	f.tries++
	if d, ok := from.ReadCloser.(interface{ Distrust() }); ok && err != nil {
		d.Distrust() // another mirror is to be asked
	}
	if err == nil || f.tries == 2 || f.id.layer.ctx.Err() != nil {
		q.finish(f, err)
		return
	}
	q.work.Go(func() { q.fly(f.run, []*flight{f}) })
}

// land decodes the member that r begins with, verifies its chunks, and stores them: the one place where
// bytes become trusted.
func (q *Queue) land(f *flight, r io.Reader) error {
	zr, err := q.decoder(f.id.layer.Table.Compression(), r)
	if err != nil {
		return f.errorf(err)
	}
	defer zr.Close()
	f.data, f.lost = nil, nil // of the first try
	var at int64              // in bytes of the member
	for _, ref := range f.refs {
		c, _ := ref.Object.Chunk(ref.Chunk)
		if _, err := io.CopyN(io.Discard, zr, c.Inner-at); err != nil {
			return f.errorf(noEOF(err))
		}
		if c.Size <= 0 || c.Size > toc.MaxChunkSize {
			return f.errorf(fmt.Errorf("the chunk table is damaged: a chunk of %d bytes", c.Size))
		}
		p := buffers.get(int(c.Size))
		if _, err := io.ReadFull(zr, p); err != nil {
			return f.errorf(noEOF(err))
		}
		at = c.Inner + c.Size
		if sum := sha256.Sum256(p); sum != c.Digest {
			return f.errorf(fmt.Errorf("chunk at byte %d of the member is %v, not %v as the TOC says", c.Inner, toc.Digest(sum), c.Digest))
		}
		key := store.Key(ref.Object.Key)
		if err := q.put(key, ref.Chunk, p); err != nil {
			f.lost = err
			f.keep(key, ref.Chunk, p)
			if f.id.layer.ctx.Err() == nil { // else nobody has the object any more: its image was unmounted
				q.fullStore(err)
			}
			continue
		}
		buffers.put(p)
	}
	return nil
}

func (f *flight) errorf(err error) error {
	start, _ := f.id.layer.Table.Member(f.id.member)
	return fmt.Errorf("member at byte %d of the blob: %w", start, err)
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// put stores verified bytes.
func (q *Queue) put(key store.Key, i int, p []byte) error {
	o, err := q.Open(id(key))
	if err != nil {
		return err
	}
	defer o.Close()
	return o.put(i, p)
}

// fullStore reports that the store did not take something, once a minute.
func (q *Queue) fullStore(err error) {
	now := time.Now().Unix()
	if last := q.lastFull.Load(); now-last >= 60 && q.lastFull.CompareAndSwap(last, now) {
		q.log.Warn("the store does not grow; reads are served from memory and fetched again each time", "err", err)
	}
}

// finish ends a flight: its chunks are in the store, or in memory for those who wait; or err says why neither.
func (q *Queue) finish(f *flight, err error) {
	f.err = err
	q.mu.Lock()
	if err == nil && f.lost == nil {
		f.id.layer.members[f.id.member].Store(true)
	}
	delete(q.flights, f.id)
	if f.waiters.Load() == 0 { // and nobody can join any more
		f.data = nil
	}
	q.mu.Unlock()
	close(f.done)
}

// maxZstdWindow bounds the memory of one zstd decoder. Level 19 uses 8 MiB.
const maxZstdWindow = 64 << 20

// decoder returns a reader of one compressed stream's content. Close gives it back.
func (q *Queue) decoder(c toc.Compression, r io.Reader) (io.ReadCloser, error) {
	switch c {
	case toc.Gzip:
		z, _ := q.gzips.Get().(*gzip.Reader)
		if z == nil {
			z = new(gzip.Reader)
		}
		if err := z.Reset(r); err != nil {
			return nil, noEOF(err)
		}
		z.Multistream(false)
		return &pooled{z, func() { q.gzips.Put(z) }}, nil
	case toc.Zstd:
		z, _ := q.zstds.Get().(*zstd.Decoder)
		if z == nil {
			var err error
			z, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxZstdWindow))
			if err != nil {
				return nil, err
			}
		}
		if err := z.Reset(r); err != nil {
			return nil, err
		}
		return &pooled{z, func() { z.Reset(nil); q.zstds.Put(z) }}, nil
	}
	return nil, fmt.Errorf("unknown compression %d", c)
}

type pooled struct {
	io.Reader
	back func()
}

func (p *pooled) Close() error { p.back(); return nil }

// A bufferPool lends buffers by size class, so that fetching makes no garbage per chunk.
type bufferPool [27]sync.Pool // powers of two up to MaxChunkSize

var buffers bufferPool

func class(n int) int {
	c := 0
	for 1<<c < n {
		c++
	}
	return c
}

func (b *bufferPool) get(n int) []byte {
	if p, _ := b[class(n)].Get().(*[]byte); p != nil {
		return (*p)[:n]
	}
	return make([]byte, n, 1<<class(n))
}

func (b *bufferPool) put(p []byte) {
	if c := class(cap(p)); cap(p) == 1<<c {
		p = p[:cap(p)]
		b[c].Put(&p)
	}
}
