package fetch

import (
	"context"
	"errors"
	"io/fs"
	"slices"

	"lazuli/fs/store"
)

// Who follows what a start reads ([Recorder.More]) has what it may read next brought, and looks into some of it to see what that is.
// Nobody waits for that: none of it counts as a read.

// Bring begins to fetch the chunks that are wanted of some layers, which were added, and that are neither here nor on their way, in few
// requests, with some of what lies around them. It does not wait for them, and they stay compressed until somebody reads them or the node is at rest.
func (q *Queue) Bring(wants []Want, layers ...*Layer) AheadStats { return q.bring(wants, true, layers) }

// WaitSlot returns when what Bring begins would be asked for at once: who waits for that may find more to ask for in the same requests.
func (q *Queue) WaitSlot(ctx context.Context) error {
	select {
	case q.aheadSlots <- struct{}{}:
		<-q.aheadSlots
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (q *Queue) bring(wants []Want, parks bool, layers []*Layer) AheadStats {
	w := q.newWanting(layers)
	for _, x := range wants {
		w.add(x)
	}
	// What lies between stays compressed, so it costs the link alone, and a request costs a round trip: so up to half of what comes in
	// one. What lies around is of the same folder: a quarter of the requests less, and a third of the reads that wait.
	window := q.link.window()
	for _, s := range w.stretches(max(window/2, maxLeap)) {
		if s.parks = parks; parks {
			q.widen(&s, window/8)
		}
		w.start(s)
	}
	return w.stats
}

// widen adds to a stretch what lies around it, up to n bytes of the blob on each side, as far as that is neither here nor under way.
func (q *Queue) widen(s *stretch, n int64) {
	t := s.layer.Table
	first, last := s.wanted[0], s.wanted[len(s.wanted)-1]
	from, _ := t.Member(first)
	_, to := t.Member(last)
	var before []int
	for m := first - 1; m >= 0; m-- {
		if start, _ := t.Member(m); from-start > n || q.had(s.layer, m) {
			break
		}
		before = append(before, m)
	}
	slices.Reverse(before)
	for m := last + 1; m < t.NumMembers(); m++ {
		if _, end := t.Member(m); end-to > n || q.had(s.layer, m) {
			break
		}
		s.wanted = append(s.wanted, m)
	}
	s.wanted = append(before, s.wanted...)
}

var errNotBrought = errors.New("it did not come")

// Glance fills p with the bytes of an object at off, which are within it. What is missing is fetched, without any neighbours, from one of the
// layers, which were added. The error says why it cannot be had, or that ctx has ended.
func (q *Queue) Glance(ctx context.Context, key store.Key, p []byte, off int64, layers ...*Layer) error {
	if len(p) == 0 {
		return nil
	}
	o, err := q.Open(id(key))
	if err != nil {
		return err
	}
	defer o.Close()
	if off < 0 || off > o.size-int64(len(p)) || o.key != key {
		return fs.ErrInvalid
	}
	if r := o.complete(); r != nil {
		return o.readFull(r, p, off)
	}
	first, last := o.table().ChunkAt(off), o.table().ChunkAt(off+int64(len(p))-1)
	var missing []Want
	for i := first; i <= last; i++ {
		if !o.has(i) {
			missing = append(missing, Want{key, i})
		}
	}
	q.bring(missing, false, layers)
	for _, x := range missing {
		f := o.arriving(x.Chunk)
		if f == nil {
			continue // it has arrived meanwhile
		}
		err := f.wait(ctx)
		f.release()
		if err != nil {
			return err
		}
	}
	if ok, err := o.readHere(p, off); !ok && err == nil {
		return errNotBrought
	} else {
		return err
	}
}

// arriving returns what brings chunk i of the object, with one more waiter, or nil if nothing does.
func (o *Object) arriving(i int) *flight {
	q := o.q
	q.mu.Lock()
	defer q.mu.Unlock()
	f := q.packs[packID{id(o.key), i}]
	for _, src := range *o.srcs.Load() {
		if f == nil && i < src.object.NumChunks() {
			if _, m := src.object.Chunk(i); m >= 0 {
				f = q.flights[memberID{src.layer, m}]
			}
		}
	}
	if f != nil {
		f.waiters.Add(1)
		q.wake(f)
	}
	return f
}
