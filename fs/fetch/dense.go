package fetch

import (
	"fmt"

	"lazuli/fs/store"
)

// A layer of which a job reads nearly everything (it is searched, copied, packed) is read densely. The rest of it is then fetched at once, in large
// requests side by side, and decoded as it arrives: readers that come to what is here already are served by the kernel alone. A job that
// stops reading there has cost the rest of one layer.
//
// What tells such a job from a start is that it goes through the blob in order. Of an image with Python and SciPy that nobody profiled, tar came to
// a run of 30 MiB in the largest layer, and of 4 MiB after it had asked for 4 to 5 MiB; the start of a job, which asked for 19 MiB of that layer in
// all, came to 1 MiB.

const (
	// denseRun is how much readers ask for in a run, in bytes of the blob, before a layer counts as read densely.
	denseRun = 4 << 20
	// A run goes on over denseGap members, and a little backwards, since several readers may be at it.
	denseGap  = 32
	denseBack = 8
	// denseObject is how much of one object counts, in bytes of the blob: that a large file is read from beginning to end says nothing of others.
	denseObject = 1 << 20

	// Readers that go in no order read densely if they ask for one part in denseShare of the layer, and for denseLeast, and not for less
	// than one part in denseHits of what was fetched for that.
	denseShare = 4
	denseLeast = 8 << 20
	denseHits  = 2

	// denseRuns is how many requests for the rest of a layer are under way: with maxRun what a link of 1 Gbit/s carries in 130 ms.
	denseRuns = 4
)

// A density is how a layer is read, in bytes of its blob.
type density struct {
	last    int   // the member that readers asked for last
	run     int64 // how much they asked for in a run
	asked   int64 // in all
	brought int64 // how much was fetched, for readers and ahead of them
	dense   bool  // the rest is being fetched, or is here

	object     store.Key // of which readers asked last
	ofThatOnly int64     // how much they asked of it in a row
}

// ask notes that a reader asked for a flight of l, and reports whether the layer has become dense by that.
func (d *density) ask(l *Layer, f *flight) (became bool) {
	m := f.id.member
	start, end := l.Table.Member(m)
	n := end - start
	if key := store.Key(f.refs[len(f.refs)-1].Object.Key); key != d.object {
		d.object, d.ofThatOnly = key, 0
	}
	if d.ofThatOnly += n; d.ofThatOnly > denseObject {
		d.last = m
		d.brought -= n
		return false
	}
	switch skipped := m - d.last - 1; {
	case skipped < -denseBack || skipped > denseGap:
		d.run /= 2
	case skipped > 0:
		_, from := l.Table.Member(d.last)
		d.run = max(0, d.run-(start-from)/2)
	}
	d.last = m
	d.run += n
	d.asked += n
	if d.dense {
		return false
	}
	d.dense = d.run >= denseRun || d.asked >= max(l.span()/denseShare, denseLeast) && d.asked*denseHits >= d.brought
	return d.dense
}

// span is how many bytes the layer's members take in the blob.
func (l *Layer) span() int64 {
	start, _ := l.Table.Member(0)
	_, end := l.Table.Member(l.Table.NumMembers() - 1)
	return end - start
}

// ask notes that a reader asks for a flight. The caller holds q.mu.
func (q *Queue) ask(f *flight) {
	l := f.id.layer
	if f.asked {
		return
	}
	f.asked = true
	if !l.density.ask(l, f) || q.closed {
		return
	}
	q.work.Go(func() {
		if err := q.rest(l, f.id.member); err != nil {
			// Readers that need it ask by themselves, and hear of it.
			q.log.Debug("a layer that is read densely", "err", err)
			q.mu.Lock()
			l.density = density{}
			q.mu.Unlock()
		}
	})
	q.work.Go(func() { // what is parked of it
		for q.landParked(l) {
		}
	})
}

// rest fetches everything of a layer that is not here, from a member on and then what lies before it.
func (q *Queue) rest(l *Layer, from int) error {
	var under [][]*flight // runs that were begun, the oldest first
	reap := func(keep int) error {
		for len(under) > keep {
			for _, f := range under[0] {
				if err := f.wait(l.ctx); err != nil {
					return fmt.Errorf("%s: %w", l.Name, err)
				}
				if f.lost != nil { // the store does not grow
					return fmt.Errorf("%s: %w", l.Name, f.lost)
				}
			}
			under = under[1:]
		}
		return nil
	}
	for _, part := range [][2]int{{from, l.Table.NumMembers()}, {0, from}} {
		for m := part[0]; m < part[1]; {
			if err := reap(denseRuns - 1); err != nil {
				return err
			}
			var flights []*flight
			if flights, m = q.startRun(l, m, part[1], maxRun, ahead, 0); len(flights) > 0 {
				under = append(under, flights)
			}
		}
	}
	return reap(0)
}
