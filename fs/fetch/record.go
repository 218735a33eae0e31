package fetch

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"lazuli/fs/store"
)

// A Touch is a read of an object.
type Touch struct {
	Key    store.Key
	Off, N int64         // bytes of the file
	After  time.Duration // the recording began
}

// A Recorder writes down what is read of some layers' objects, in its order, from [Queue.Record] until Stop. What is in the store
// before it is opened is not read here, unless the mount was made so that it is.
type Recorder struct {
	q      *Queue
	layers []*Layer // nil is all
	begun  time.Time
	first  chan struct{} // closed at the first touch
	more   chan struct{} // has a token when there is something new
	latest atomic.Int64  // touch, in nanoseconds from begun

	mu   sync.Mutex
	list []Touch
}

const (
	// maxTouches bounds what one recorder keeps, to 3.5 MiB. What a start reads first is what counts, so the first ones stay.
	maxTouches = 1 << 16
	// maxTouch is how much may be one touch if it is read from front to back.
	maxTouch = 1 << 20
)

// Record begins to write down every read of an object that one of the layers has, or of any if there are none. Several recorders may
// be at it at once.
func (q *Queue) Record(layers ...*Layer) *Recorder {
	r := &Recorder{q: q, layers: layers, begun: time.Now(), first: make(chan struct{}), more: make(chan struct{}, 1)}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.recorders.Store(new(append(q.recording()[:len(q.recording()):len(q.recording())], r)))
	return r
}

// recording returns the recorders, not to be modified.
func (q *Queue) recording() []*Recorder {
	if list := q.recorders.Load(); list != nil {
		return *list
	}
	return nil
}

// Stop ends the recording and returns what was read. It may be called again.
func (r *Recorder) Stop() []Touch {
	q := r.q
	q.mu.Lock()
	rest := slices.DeleteFunc(slices.Clone(q.recording()), func(x *Recorder) bool { return x == r })
	if len(rest) > 0 {
		q.recorders.Store(&rest)
	} else {
		q.recorders.Store(nil) // so that reads ask for nothing else
	}
	q.mu.Unlock()
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.list
}

// Begun is closed when something has been read.
func (r *Recorder) Begun() <-chan struct{} { return r.first }

// More has a token when something was read that [Recorder.From] has not returned yet: for one goroutine that follows what is read.
func (r *Recorder) More() <-chan struct{} { return r.more }

// From returns what was read so far but for the first n.
func (r *Recorder) From(n int) []Touch {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.list[min(n, len(r.list)):])
}

// Quiet returns for how long nothing has been read. It is of use when something was.
func (r *Recorder) Quiet() time.Duration {
	return time.Since(r.begun) - time.Duration(r.latest.Load())
}

// touched has the recorders write down a read of n bytes at off.
func (o *Object) touched(off, n int64) {
	for _, r := range o.q.recording() {
		if r.layers == nil || slices.ContainsFunc(*o.srcs.Load(), func(s source) bool { return slices.Contains(r.layers, s.layer) }) {
			r.touch(o.key, off, n)
		}
	}
}

func (r *Recorder) touch(key store.Key, off, n int64) {
	at := time.Since(r.begun)
	r.latest.Store(int64(at))
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.list) == 0 {
		close(r.first)
	}
	if last := len(r.list) - 1; last >= 0 && r.list[last].Key == key && r.list[last].Off+r.list[last].N == off && r.list[last].N+n <= maxTouch {
		r.list[last].N += n
		return
	}
	if len(r.list) < maxTouches {
		r.list = append(r.list, Touch{Key: key, Off: off, N: n, After: at})
		select {
		case r.more <- struct{}{}:
		default:
		}
	}
}
