package fetch

import (
	"container/list"
	"context"
	"errors"
	"time"
)

// What a window brings and nobody has asked for is parked: it stays compressed, in memory. The processors are what a
// start is short of when the link is fast, and most of it will never be read. A parked flight is decoded when somebody joins it, or
// when nobody has waited for a while.

const (
	// maxParked is how many compressed bytes are parked.
	maxParked = 128 << 20
	// quietFor is how long nobody must have waited before what is parked is decoded.
	quietFor = 500 * time.Millisecond
)

var errDropped = errors.New("it was fetched ahead, and dropped before anybody asked for it")

// A lot is the parked flights of a queue, under its mu.
type lot struct {
	list  list.List // of the *flight, the oldest first
	bytes int64
	limit int64 // of bytes; of more, the oldest are dropped: it is as if they had not been fetched
	busy  bool  // something decodes what is parked
}

// parkOrLand takes over a flight whose bytes, b, have arrived: nobody may wait for it.
func (q *Queue) parkOrLand(f *flight, b []byte, from *body) {
	q.mu.Lock()
	f.arrived = true
	if f.run.parks && !f.wanted && !f.id.layer.density.dense && f.waiters.Load() == 0 && !q.closed && f.id.layer.ctx.Err() == nil {
		f.parked = &parked{b: b, from: from}
		f.parked.at = q.lot.list.PushBack(f)
		q.lot.bytes += int64(len(b))
		for q.lot.bytes > q.lot.limit {
			q.drop(q.lot.list.Front().Value.(*flight))
		}
		if !q.lot.busy {
			q.lot.busy = true
			q.work.Go(q.clearLot)
		}
		q.mu.Unlock()
		return
	}
	q.mu.Unlock()
	q.decoders <- struct{}{}
	q.work.Go(func() {
		defer func() { <-q.decoders }()
		q.landOrRetry(f, b, from)
	})
}

// A parked is a flight's bytes.
type parked struct {
	b    []byte
	from *body
	at   *list.Element // in lot.list
}

// unpark takes a flight that is parked off the lot and returns its bytes. The caller holds q.mu.
func (q *Queue) unpark(f *flight) *parked {
	p := f.parked
	q.lot.list.Remove(p.at)
	q.lot.bytes -= int64(len(p.b))
	f.parked = nil
	return p
}

// wake decodes a flight that is parked, which somebody wants now. The caller holds q.mu.
func (q *Queue) wake(f *flight) {
	if f.parked == nil || q.closed {
		return
	}
	p := q.unpark(f)
	q.work.Go(func() {
		// Who wants it waits for a processor, not for those that decode what came later.
		q.landOrRetry(f, p.b, p.from)
	})
}

// drop ends a flight that is parked. Nobody waits for it, or it would not be, and nobody finds it any more. The caller holds q.mu.
func (q *Queue) drop(f *flight) {
	buffers.put(q.unpark(f).b)
	delete(q.flights, f.id)
	f.err = errDropped
	close(f.done)
}

// clearLot decodes what is parked, one after the other, whenever nobody has waited for a while, until nothing is parked.
func (q *Queue) clearLot() {
	for {
		reads, err := q.idle()
		if err != nil {
			return // Close drops what is left
		}
		for q.reads.Load() == reads {
			if !q.landParked(nil) {
				q.mu.Lock()
				empty := q.lot.list.Len() == 0 || q.closed
				if empty {
					q.lot.busy = false
				}
				q.mu.Unlock()
				if empty {
					return
				}
			}
		}
	}
}

// landParked decodes what has been parked for longest, of a layer or with nil of all, and reports false if nothing is.
func (q *Queue) landParked(l *Layer) bool {
	q.mu.Lock()
	e := q.lot.list.Front()
	for e != nil && l != nil && e.Value.(*flight).id.layer != l {
		e = e.Next()
	}
	if e == nil || q.closed {
		q.mu.Unlock()
		return false
	}
	f := e.Value.(*flight)
	p := q.unpark(f)
	q.mu.Unlock()
	q.decoders <- struct{}{}
	defer func() { <-q.decoders }()
	q.landOrRetry(f, p.b, p.from)
	return true
}

// idle returns when nobody has waited for quietFor, with the number of reads until then, or with an error when the queue is closed.
func (q *Queue) idle() (reads int64, err error) {
	for {
		before := q.reads.Load()
		select {
		case <-time.After(quietFor):
		case <-q.ctx.Done():
			return 0, context.Cause(q.ctx)
		}
		if err := q.waitQuiet(q.ctx, nil); err != nil {
			return 0, err
		}
		if q.reads.Load() == before {
			return before, nil
		}
	}
}

// dropParked ends all flights that are parked and that which, nil being all of them, accepts.
func (q *Queue) dropParked(which func(*Layer) bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for e := q.lot.list.Front(); e != nil; {
		f := e.Value.(*flight)
		e = e.Next()
		if which == nil || which(f.id.layer) {
			q.drop(f)
		}
	}
}

// wakeLayer decodes what is parked of a layer.
func (q *Queue) wakeLayer(l *Layer) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for e := q.lot.list.Front(); e != nil; {
		f := e.Value.(*flight)
		e = e.Next()
		if f.id.layer == l {
			q.wake(f)
		}
	}
}
