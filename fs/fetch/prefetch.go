package fetch

import (
	"cmp"
	"context"
	"slices"

	"lazuli/fs/store"
	"lazuli/fs/toc"
)

// A Want is a chunk of an object that somebody is going to read.
type Want struct {
	Key   store.Key
	Chunk int
}

// AheadStats says what came of a list of wants.
type AheadStats struct {
	Chunks int   // that are in one of the layers
	Here   int   // of those, that were in the store already
	Bytes  int64 // of blobs that were asked for
	Runs   int   // requests that this took
}

const (
	// maxLeap is how many bytes of a blob that nobody wants are fetched to have what is on both sides of them in one request:
	// what a link of 1 Gbit/s brings in 2 ms.
	maxLeap = 256 << 10
	// aheadBatch is how many bytes of blobs are put in the order of the blobs rather than in that of the wants.
	aheadBatch = 8 << 20
	// aheadRuns is how many requests are under way for a list of wants: demand reads share the link with them. Small ones, which wait for
	// round trips more than they use the link, may be more: so many that aheadBytes are under way. Beside a startup pack, which fills the queue of a slow link, each of
	// them takes a second.
	aheadRuns  = 3
	aheadBytes = 4 << 20
)

// Ahead fetches the chunks that are wanted of some layers, which were added, and that are not here, roughly in the order of the wants and in
// few requests. It returns when they are in, or have failed, or with an error when ctx ends. Demand reads overtake it, and join what
// is under way. What a request brings besides, nobody has asked for: it stays compressed until somebody does.
func (q *Queue) Ahead(ctx context.Context, wants []Want, layers ...*Layer) (s AheadStats, err error) {
	w := q.newWanting(layers)
	for _, l := range layers {
		// What is missing is mostly what changed since: single.
		l.packed.Store(true)
	}
	for _, x := range wants {
		if err = w.add(x); err == nil && w.bytes >= aheadBatch {
			err = w.send(ctx)
		}
		if err != nil {
			break
		}
	}
	if err == nil {
		err = w.send(ctx)
	}
	if err == nil {
		err = w.reap(ctx, 0)
	}
	return w.stats, err
}

// A wanting is one call of Ahead.
type wanting struct {
	q      *Queue
	layers []*Layer
	seen   map[memberID]bool // members that were wanted before
	batch  []memberID        // that are wanted and not asked for yet, in the order of the wants
	bytes  int64             // of batch
	under  []under           // runs that were begun and not waited for yet, oldest first
	flying int64             // bytes of under
	stats  AheadStats
}

// An under is a run that was begun.
type under struct {
	flights []*flight
	bytes   int64 // of the blob
}

// newWanting returns one for layers. Another image may have one of them too, and what reads ask for is asked of the layer that came first: before each there is
// the first that is of the same blob, so that both find what is under way.
func (q *Queue) newWanting(layers []*Layer) *wanting {
	w := &wanting{q: q, seen: map[memberID]bool{}}
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, l := range layers {
		if i := slices.IndexFunc(q.layers, func(x *Layer) bool { return x.Name == l.Name }); i >= 0 && q.layers[i] != l {
			w.layers = append(w.layers, q.layers[i])
		}
		w.layers = append(w.layers, l)
	}
	return w
}

// add adds a want to the batch, unless it is here or comes with a startup pack.
func (w *wanting) add(x Want) error {
	for _, l := range w.layers {
		o, ok := l.Table.Find(toc.Digest(x.Key))
		if !ok || x.Chunk < 0 || x.Chunk >= o.NumChunks() {
			continue
		}
		_, m := o.Chunk(x.Chunk)
		if m < 0 { // a hole, or of a layer that comes whole
			return nil
		}
		w.stats.Chunks++
		id := memberID{l, m}
		switch {
		case w.q.seen(l, m):
			w.stats.Here++
		case w.seen[id] || w.q.expected(x.Key, x.Chunk):
		default:
			w.seen[id] = true
			w.batch = append(w.batch, id)
			start, end := l.Table.Member(m)
			w.bytes += end - start
		}
		return nil
	}
	return nil
}

// A stretch is members of a layer that are fetched in one request.
type stretch struct {
	layer  *Layer
	wanted []int // in the order of the blob
	rank   int   // the place of the first one in the order of the wants
	parks  bool  // nor is what is wanted decoded before somebody asks for it
}

// stretches puts members of the batch together that lie close to each other, with at most leap bytes between.
func (w *wanting) stretches(leap int64) (list []stretch) {
	rank := map[memberID]int{}
	for i, id := range w.batch {
		rank[id] = i
	}
	sorted := slices.Clone(w.batch)
	slices.SortFunc(sorted, func(a, b memberID) int {
		return cmp.Or(cmp.Compare(slices.Index(w.layers, a.layer), slices.Index(w.layers, b.layer)), cmp.Compare(a.member, b.member))
	})
	for _, id := range sorted {
		start, end := id.layer.Table.Member(id.member)
		if n := len(list) - 1; n >= 0 && list[n].layer == id.layer {
			s := &list[n]
			begin, _ := id.layer.Table.Member(s.wanted[0])
			_, last := id.layer.Table.Member(s.wanted[len(s.wanted)-1])
			if start-last <= leap && end-begin <= maxRun {
				s.wanted = append(s.wanted, id.member)
				s.rank = min(s.rank, rank[id])
				continue
			}
		}
		list = append(list, stretch{layer: id.layer, wanted: []int{id.member}, rank: rank[id]})
	}
	slices.SortFunc(list, func(a, b stretch) int { return cmp.Compare(a.rank, b.rank) })
	return list
}

// send asks for the batch.
func (w *wanting) send(ctx context.Context) error {
	for _, s := range w.stretches(maxLeap) {
		keep := aheadRuns - 1
		if w.flying < aheadBytes {
			keep = aheadRequests - 1
		}
		if err := w.reap(ctx, keep); err != nil {
			return err
		}
		w.start(s)
	}
	w.batch, w.bytes = w.batch[:0], 0
	return nil
}

// start begins to fetch a stretch.
func (w *wanting) start(s stretch) {
	flights := w.q.startStretch(s)
	if len(flights) == 0 {
		return
	}
	start, _ := s.layer.Table.Member(flights[0].id.member)
	_, end := s.layer.Table.Member(flights[len(flights)-1].id.member)
	w.under = append(w.under, under{flights, end - start})
	w.flying += end - start
	w.stats.Bytes += end - start
	w.stats.Runs++
}

// reap waits until at most so many runs are under way. What fails is for who reads it to hear of.
func (w *wanting) reap(ctx context.Context, keep int) error {
	for len(w.under) > keep {
		for _, f := range w.under[0].flights {
			if !f.wanted {
				continue // it may stay parked
			}
			if err := f.wait(ctx); err != nil && ctx.Err() != nil {
				return err
			}
		}
		w.flying -= w.under[0].bytes
		w.under = w.under[1:]
	}
	return nil
}

// startStretch begins to fetch a stretch and what lies between its members, in one request, and returns the flights. What is here or under way
// is left out at both ends, and between them what the request brings of it is thrown away.
func (q *Queue) startStretch(s stretch) []*flight {
	l := s.layer
	first, last := s.wanted[0], s.wanted[len(s.wanted)-1]
	here := make([]bool, last-first+1) // asked without the lock, since the answer may need the disk
	for m := first; m <= last; m++ {
		here[m-first] = q.seen(l, m)
	}
	r := &run{priority: ahead, parks: true, promoted: make(chan struct{})}
	var flights []*flight
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed || l.ctx.Err() != nil {
		return nil
	}
	end := 0 // of the flights, behind the last one that is wanted
	for m := first; m <= last; m++ {
		id := memberID{l, m}
		_, wanted := slices.BinarySearch(s.wanted, m)
		if here[m-first] || q.flights[id] != nil || l.members[m].Load() || !wanted && len(flights) == 0 {
			continue
		}
		flights = append(flights, &flight{id: id, refs: l.Table.MemberRefs(m), run: r, wanted: wanted && !s.parks, done: make(chan struct{})})
		if wanted {
			end = len(flights)
		}
	}
	if flights = flights[:end]; end == 0 {
		return nil
	}
	for _, f := range flights {
		q.flights[f.id] = f
		if s.parks { // else it is wanted for sure, and says nothing of how the layer is read
			begin, end := l.Table.Member(f.id.member)
			l.density.brought += end - begin
		}
	}
	q.work.Go(func() { q.fly(r, flights) })
	return flights
}
