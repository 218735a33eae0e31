// Package fetch brings what is missing: it turns reads of objects into range requests of
// blobs, and the members that arrive into verified chunks in the store.
//
// Three things are asked of a [Queue]: a demand read ([Object.ReadAt]: somebody waits), reading
// ahead of one (nobody waits yet), and filling ([Queue.Fill]: the rest, so that the node outlives
// its registry). Demand goes first: a fill that is under way stops taking bytes from the link
// while a demand read waits for others. Who reads a blob as a whole for another reason does so like a
// fill ([Queue.Behind]), and hands over the chunks that go by ([Queue.Offer]).
//
// The unit of fetching is the member, a compressed stream: it is fetched once however
// many readers wait for it, and everything in it is kept. The unit of verification is the chunk.
// No byte leaves this package, to a reader or to the store, that was not checked against
// its chunk's digest; no error is remembered; and a fetch that has begun goes on when the reader
// who asked first gives up.
//
// Bytes are served from the store. While the store cannot grow (disk full), readers get
// theirs from memory, and the next reader fetches again.
package fetch

import (
	"container/list"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"lazuli/fs/store"
	"lazuli/fs/toc"
)

// A Blob is compressed bytes at an offset, from wherever.
type Blob interface {
	// Range returns bytes off to off+n of the blob as a stream, unverified. A stream that ends
	// early ends in an error. Range and the stream's Read return soon after ctx ended.
	Range(ctx context.Context, off, n int64) (io.ReadCloser, error)
}

// A Layer is where objects come from.
type Layer struct {
	Name  string // for errors: "layer sha256:…"
	Table *toc.Table
	Blob  Blob
	// Whole brings every object of a layer without members (toc.Whole) into the store. It is not called for
	// other layers.
	Whole func(ctx context.Context) error

	packed   atomic.Bool            // a startup pack has brought what a start wants of it, or brings it
	arriving atomic.Pointer[packed] // which does so; nil for none
	members  []atomic.Bool          // all of the member's chunks were seen in the store
	ctx      context.Context        // ends when the layer is removed; the life of its fetches
	cancel   context.CancelCauseFunc

	// Under Queue.mu:
	streams [4]stream
	density density
	turn    int          // the stream that is replaced next
	whole   *wholeFlight // nil if the layer is not being fetched whole
}

// A stream is a run of demand reads that go forward through a blob.
type stream struct {
	next   int   // the member behind the last fetched one
	window int64 // bytes of the blob fetched beyond what was asked for
}

// Options configures a Queue. Its zero value is the recommendation.
type Options struct {
	Logger *slog.Logger // nil is silent
	// ReadTimeout is how long one read waits for the network before it fails. Zero is a minute.
	ReadTimeout time.Duration
}

const (
	// Somebody waits for a demand read, so its round trip is what counts. Registries and
	// proxies begin to queue beyond some dozens of requests from one client.
	demandRequests = 24
	// Nobody waits for the rest: enough requests to keep the link busy across a round trip. Those of fills
	// are counted by themselves, since they are held while demand reads wait.
	aheadRequests = 16
	fillRequests  = 3

	// firstWindow is how much is read ahead, in bytes of the blob, at a miss with no history, while the link is not known
	// (link.window). It doubles at each further miss in sequence up to maxWindow. A Python job with SciPy that nobody profiled
	// took, at 20 ms and 1 Gbit/s, with a fixed window:
	//
	//	window     128 KiB  512 KiB  1 MiB  2 MiB
	//	seconds        5.5      3.8    3.4    2.8
	//	misses         190      120     92     61
	//	MB              36       51     64     80
	firstWindow = 1 << 20
	maxWindow   = 8 << 20

	// maxRun is the most that one request asks for when nobody waits.
	maxRun = 4 << 20

	openObjects = 512 // files kept open
)

// Stats counts what a Queue did.
type Stats struct {
	Requests int64 // range requests begun, retries included
	Fetched  int64 // bytes of blobs that arrived
	Needed   int64 // bytes of files that readers waited for
	Misses   int64 // reads that waited for the network
	Errors   int64 // reads that failed
}

// Since returns what was done after before.
func (s Stats) Since(before Stats) Stats {
	return Stats{s.Requests - before.Requests, s.Fetched - before.Fetched, s.Needed - before.Needed, s.Misses - before.Misses, s.Errors - before.Errors}
}

// A Queue fetches for all mounted images of a node. It may be used by several goroutines.
type Queue struct {
	store   *store.Store
	log     *slog.Logger
	timeout time.Duration

	ctx    context.Context // ends at Close; the life of shared fetches
	cancel context.CancelCauseFunc
	work   sync.WaitGroup

	mu      sync.Mutex
	closed  bool
	layers  []*Layer
	changes int // of layers
	flights map[memberID]*flight
	packs   map[packID]*flight // of frames of startup packs
	lot     lot
	objects map[uint64]*Object // open ones, by number
	unused  list.List          // of the *Object that nobody has open, oldest first

	demandSlots, aheadSlots, fillSlots, decoders chan struct{}
	waiting                                      atomic.Int64 // demand reads that wait
	packing                                      atomic.Int64 // startup packs that arrive, which hold fills up
	active                                       atomic.Int64 // when last somebody waited, or something came that is no fill's, in Unix nanoseconds
	quiet                                        chan struct{}
	quietMu                                      sync.Mutex

	gzips, zstds sync.Pool // of decompressors

	requests, fetched, needed, misses, errors atomic.Int64
	reads                                     atomic.Int64 // that did not find all in the store
	waits                                     waits
	link                                      link
	recorders                                 atomic.Pointer[[]*Recorder] // nil is none; replaced under mu
	lastFull                                  atomic.Int64                // when a full store was last logged, in Unix seconds
}

type memberID struct {
	layer  *Layer
	member int
}

// New returns a queue that fetches into s.
func New(s *store.Store, o Options) *Queue {
	q := &Queue{
		store: s, log: o.Logger, timeout: o.ReadTimeout,
		flights: map[memberID]*flight{}, packs: map[packID]*flight{}, objects: map[uint64]*Object{},
		demandSlots: make(chan struct{}, demandRequests),
		aheadSlots:  make(chan struct{}, aheadRequests),
		fillSlots:   make(chan struct{}, fillRequests),
		decoders:    make(chan struct{}, runtime.GOMAXPROCS(0)),
	}
	if q.log == nil {
		q.log = slog.New(slog.DiscardHandler)
	}
	if q.timeout == 0 {
		q.timeout = time.Minute
	}
	q.lot.limit = maxParked
	q.Touch()
	q.ctx, q.cancel = context.WithCancelCause(context.Background())
	return q
}

var (
	errClosed  = errors.New("the fetcher is closed")
	errRemoved = errors.New("the image is not mounted any more")
)

// Close ends all fetches and waits for them. Reads that wait fail. No object may be in use any more when it returns.
func (q *Queue) Close() error {
	q.mu.Lock()
	q.closed = true // so that nothing is added to what is waited for
	q.mu.Unlock()
	q.cancel(errClosed)
	q.dropParked(nil)
	q.work.Wait()
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, o := range q.objects {
		o.close()
	}
	clear(q.objects)
	q.unused.Init()
	return nil
}

// Add makes the objects of l readable. A layer is added once for every image that uses it, each time as a
// Layer of its own: images may come from different registries.
func (q *Queue) Add(l *Layer) error {
	for i := 1; i < l.Table.Len(); i++ {
		if id(store.Key(l.Table.At(i).Key)) == id(store.Key(l.Table.At(i-1).Key)) {
			return fmt.Errorf("%s: two objects share the first 63 bits of their keys", l.Name)
		}
	}
	l.members = make([]atomic.Bool, l.Table.NumMembers())
	l.ctx, l.cancel = context.WithCancelCause(q.ctx)
	q.mu.Lock()
	defer q.mu.Unlock()
	q.layers = append(q.layers, l)
	q.changes++
	return nil
}

// Remove takes back an Add. What is being fetched from the layer is given up; reads that wait for it go on with another
// layer that has the object, or fail. The layer's table must stay open until Close.
func (q *Queue) Remove(l *Layer) {
	l.cancel(errRemoved)
	q.dropParked(func(x *Layer) bool { return x == l })
	q.mu.Lock()
	defer q.mu.Unlock()
	for i, x := range q.layers {
		if x == l {
			q.layers = append(q.layers[:i:i], q.layers[i+1:]...)
			break
		}
	}
	q.changes++
	for e := q.unused.Front(); e != nil; e = e.Next() {
		o := e.Value.(*Object)
		o.close()
		delete(q.objects, id(o.key))
	}
	q.unused.Init()
}

// waitBounds are what reads that wait for a network take: from a fast link's round trip to the read timeout.
var waitBounds = [...]time.Duration{
	time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond, 50 * time.Millisecond,
	100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond, time.Second, 2500 * time.Millisecond, 10 * time.Second, time.Minute,
}

// waits counts how long demand reads waited.
type waits struct {
	counts [len(waitBounds) + 1]atomic.Int64
	sum    atomic.Int64
}

func (w *waits) add(d time.Duration) {
	i := 0
	for i < len(waitBounds) && d > waitBounds[i] {
		i++
	}
	w.counts[i].Add(1)
	w.sum.Add(int64(d))
}

// Waits says how long reads waited for the network.
type Waits struct {
	Bounds []time.Duration
	Counts []int64 // of reads that took at most the bound of the same index, and longer than the one before
	Total  int64   // of all reads that waited
	Sum    time.Duration
}

// Waits returns how long reads waited so far.
func (q *Queue) Waits() Waits {
	w := Waits{Bounds: waitBounds[:], Sum: time.Duration(q.waits.sum.Load())}
	for i := range q.waits.counts {
		n := q.waits.counts[i].Load()
		w.Total += n
		if i < len(waitBounds) {
			w.Counts = append(w.Counts, n)
		}
	}
	return w
}

// Stats returns what the queue has done so far.
func (q *Queue) Stats() Stats {
	return Stats{q.requests.Load(), q.fetched.Load(), q.needed.Load(), q.misses.Load(), q.errors.Load()}
}

// id returns an object's number: 63 bits of its key, and the upper bit set, so that small numbers are
// free for others. It says everything there is to know about the object, so that whoever
// hands ids out need not remember them.
func id(key store.Key) uint64 { return 1<<63 | binary.BigEndian.Uint64(key[:])>>1 }

// ErrAmbiguous says that two objects have the same number. Honest images do not
// get there: it takes 2^31 tries to make two such files, 2^62 to make one for a given other.
var ErrAmbiguous = errors.New("two objects share the first 63 bits of their keys")

// Lookup returns the number and the size in bytes of the object named key, if one of the layers has it.
func (q *Queue) Lookup(key store.Key) (id_ uint64, size int64, ok bool) {
	srcs, _, err := q.find(id(key))
	if err != nil || len(srcs) == 0 || store.Key(srcs[0].object.Key) != key {
		return 0, 0, false
	}
	return id(key), srcs[0].object.Size, true
}

// Size returns the size in bytes of the object with a number that Lookup returned.
func (q *Queue) Size(id uint64) (int64, bool) {
	srcs, _, err := q.find(id)
	if err != nil || len(srcs) == 0 {
		return 0, false
	}
	return srcs[0].object.Size, true
}

// A source is a layer that holds an object.
type source struct {
	layer  *Layer
	object toc.Object
}

// find returns the sources of the object numbered id, layers with members before whole ones, and of which state of
// Queue.changes that is true.
func (q *Queue) find(id uint64) ([]source, int, error) {
	q.mu.Lock()
	layers, changes := q.layers, q.changes // layers are appended to and replaced, never changed in place
	q.mu.Unlock()
	var lazy, whole []source
	var key toc.Digest
	for _, l := range layers {
		o, ok := l.Table.FindPrefix(id<<1, 63)
		if !ok {
			continue
		}
		if len(lazy)+len(whole) > 0 && o.Key != key {
			return nil, 0, ErrAmbiguous
		}
		key = o.Key
		if l.Table.Compression() == toc.Whole {
			whole = append(whole, source{l, o})
		} else {
			lazy = append(lazy, source{l, o})
		}
	}
	return append(lazy, whole...), changes, nil
}

// WaitQuiet returns when no demand read waits, or with an error when ctx ends: for who wants the link for
// something that nobody waits for.
func (q *Queue) WaitQuiet(ctx context.Context) error { return q.waitQuiet(ctx, nil) }

// waitQuiet returns when no demand read waits, when promoted is closed, or with an error when ctx ends.
func (q *Queue) waitQuiet(ctx context.Context, promoted <-chan struct{}) error {
	return q.waitUntil(ctx, promoted, func() bool { return q.waiting.Load() == 0 })
}

// waitFree is waitQuiet for fills, which leave the link to startup packs too.
func (q *Queue) waitFree(ctx context.Context, promoted <-chan struct{}) error {
	return q.waitUntil(ctx, promoted, func() bool { return q.waiting.Load() == 0 && q.packing.Load() == 0 })
}

// waitUntil returns when quiet, which becomes true only where calm is called, when promoted is closed, or with an error when
// ctx ends.
func (q *Queue) waitUntil(ctx context.Context, promoted <-chan struct{}, quiet func() bool) error {
	for !quiet() {
		q.quietMu.Lock()
		if q.quiet == nil {
			q.quiet = make(chan struct{})
		}
		calm := q.quiet
		q.quietMu.Unlock()
		if quiet() { // the last one left before it could see our channel
			break
		}
		select {
		case <-calm:
		case <-promoted:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return context.Cause(ctx)
}

// calm has those look again who wait in waitUntil.
func (q *Queue) calm() {
	q.quietMu.Lock()
	defer q.quietMu.Unlock()
	if q.quiet != nil {
		close(q.quiet)
		q.quiet = nil
	}
}

// wait counts a demand read as waiting until the returned function is called.
func (q *Queue) wait() (done func()) {
	q.waiting.Add(1)
	begun := time.Now()
	q.active.Store(begun.UnixNano())
	return func() {
		end := time.Now()
		q.active.Store(end.UnixNano())
		q.waits.add(end.Sub(begun))
		if q.waiting.Add(-1) == 0 {
			q.calm()
		}
	}
}

// holdFills keeps fills off the link until free is called.
func (q *Queue) holdFills() (free func()) {
	q.packing.Add(1)
	return sync.OnceFunc(func() {
		if q.packing.Add(-1) == 0 {
			q.calm()
		}
	})
}

// Touch says that the link is about to be wanted: [Queue.WaitIdle] counts from here.
func (q *Queue) Touch() { q.active.Store(time.Now().UnixNano()) }

// WaitIdle returns when for pause no demand read has waited and nothing has come that was not a fill's, or with an error when ctx
// ends.
func (q *Queue) WaitIdle(ctx context.Context, pause time.Duration) error {
	for {
		if err := q.waitFree(ctx, nil); err != nil {
			return err
		}
		left := pause - time.Since(time.Unix(0, q.active.Load()))
		if left <= 0 {
			return nil
		}
		select {
		case <-time.After(left):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Fill fetches everything of the layers, which were added, that is not in the store, in the order of the blobs. It returns
// when all of it is in, or with the first error: also that of a store that does not take it.
func (q *Queue) Fill(ctx context.Context, layers ...*Layer) error {
	return q.FillWhen(ctx, func(context.Context) error { return nil }, layers...)
}

// FillWhen is Fill that calls turn before each request, and makes it when turn returns nil. An error of turn's is returned.
func (q *Queue) FillWhen(ctx context.Context, turn func(context.Context) error, layers ...*Layer) error {
	for _, l := range layers {
		// What others are fetching already is passed over, and may come to nothing: hence the second look.
		for pass := 0; !q.complete(l); pass++ {
			if l.ctx.Err() != nil {
				return fmt.Errorf("%s: %w", l.Name, context.Cause(l.ctx))
			}
			if pass == attempts {
				return fmt.Errorf("%s: objects went away while it was filled", l.Name)
			}
			if err := q.fill(ctx, turn, l); err != nil {
				return err
			}
		}
	}
	return nil
}

// Complete reports whether everything of l, which was added, is in the store.
func (q *Queue) Complete(l *Layer) bool { return q.complete(l) }

// Under is what is being fetched of one layer.
type Under struct {
	Layer   string // its name
	Members int
	Waiting bool // a demand read waits for some of it
}

// Under returns what is being fetched, a line per layer, in no order.
func (q *Queue) Under() []Under {
	q.mu.Lock()
	defer q.mu.Unlock()
	at := map[*Layer]int{}
	var list []Under
	for id, f := range q.flights {
		i, ok := at[id.layer]
		if !ok {
			i = len(list)
			at[id.layer] = i
			list = append(list, Under{Layer: id.layer.Name})
		}
		list[i].Members++
		list[i].Waiting = list[i].Waiting || f.waiters.Load() > 0
	}
	return list
}

// complete reports whether everything of l is in the store.
func (q *Queue) complete(l *Layer) bool {
	if l.Table.Compression() == toc.Whole {
		for i := range l.Table.Len() {
			if !q.store.Has(store.Key(l.Table.At(i).Key)) {
				return false
			}
		}
		return true
	}
	for m := range l.Table.NumMembers() {
		if !q.seen(l, m) {
			return false
		}
	}
	return true
}

// fill fetches what is missing of l and not on its way, and waits for both.
func (q *Queue) fill(ctx context.Context, turn func(context.Context) error, l *Layer) error {
	if l.Table.Compression() == toc.Whole {
		if err := turn(ctx); err != nil {
			return err
		}
		return q.whole(ctx, l)
	}
	var under [][]*flight // runs that were begun and not yet waited for, oldest first
	reap := func(keep int) error {
		for len(under) > keep {
			for _, f := range under[0] {
				err := f.wait(ctx)
				if err == nil {
					err = f.lost
				}
				if err != nil {
					return fmt.Errorf("%s: %w", l.Name, err)
				}
			}
			under = under[1:]
		}
		return nil
	}
	for m := 0; m < l.Table.NumMembers(); {
		if q.seen(l, m) { // needs no turn
			m++
			continue
		}
		if err := reap(fillRequests - 1); err != nil {
			return err
		}
		if err := turn(ctx); err != nil {
			return err
		}
		if err := q.waitFree(ctx, nil); err != nil {
			return err
		}
		var flights []*flight
		if flights, m = q.startRun(l, m, l.Table.NumMembers(), maxRun, background, 0); len(flights) > 0 {
			under = append(under, flights)
		}
	}
	if err := reap(0); err != nil {
		return err
	}
	return q.await(ctx, l)
}

// await returns when what is under way of l has ended, well or not.
func (q *Queue) await(ctx context.Context, l *Layer) error {
	q.wakeLayer(l)
	var flights []*flight
	q.mu.Lock()
	for id, f := range q.flights {
		if id.layer == l {
			flights = append(flights, f)
		}
	}
	q.mu.Unlock()
	for _, f := range flights {
		f.wait(ctx)
	}
	return context.Cause(ctx)
}
