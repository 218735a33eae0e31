package fetch

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"

	"lazuli/fs/store"
)

// wants are all chunks of files.
func (w *world) wants(files ...file) (list []Want) {
	for _, f := range files {
		if len(f.data) == 0 {
			continue
		}
		o, _ := w.layer.Table.Find(([32]byte)(w.key(f.name)))
		for i := range o.NumChunks() {
			list = append(list, Want{w.key(f.name), i})
		}
	}
	return list
}

// What is wanted comes in few requests and no member twice, and is read without any other; what lies between stays compressed; what nobody
// knows is passed over.
func TestAhead(t *testing.T) {
	s := build(t, many(200))
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		near := []file{s.files[4], s.files[2], s.files[9], s.files[17]}
		wants := append(w.wants(near...), Want{store.Key{1}, 0}, Want{w.key(s.files[1].name), 99})
		stats, err := w.q.Ahead(t.Context(), wants, w.layer)
		if err != nil || stats.Runs != 1 || stats.Here != 0 || stats.Chunks != len(wants)-2 {
			t.Errorf("%+v, %v", stats, err)
		}
		if n, _ := w.parked(); n == 0 {
			t.Error("nothing that lies between is parked")
		}
		for _, f := range near {
			if !w.store.Has(w.key(f.name)) {
				t.Errorf("%s is not in the store", f.name)
			}
			w.want(f, 0, len(f.data))
		}
		if got := w.blob.requests(); got != 1 || w.q.Stats().Misses != 0 {
			t.Errorf("%d requests, %+v", got, w.q.Stats())
		}
		stats, err = w.q.Ahead(t.Context(), wants, w.layer)
		if err != nil || stats.Runs != 0 || stats.Here != stats.Chunks {
			t.Errorf("again: %+v, %v", stats, err)
		}
		w.wantAll(nil)
		synctest.Wait()
		if n, most := w.blob.delivered(); most > 1 || n > int64(len(s.blob)) {
			t.Errorf("%d bytes of %d, one of them %d times", n, len(s.blob), most)
		}
	})
}

// What lies between and is here is not stored again, and what follows it is right.
func TestAheadLeaps(t *testing.T) {
	s := build(t, many(60))
	w := s.enter(t)
	mid := s.files[9]
	for _, x := range w.wants(mid) {
		if _, err := w.q.Ahead(t.Context(), []Want{x}, w.layer); err != nil {
			t.Fatal(err)
		}
	}
	before := w.blob.requests()
	stats, err := w.q.Ahead(t.Context(), w.wants(s.files[5], s.files[8], s.files[10], s.files[14]), w.layer)
	if err != nil || stats.Runs != 1 || w.blob.requests() != before+1 {
		t.Errorf("%+v, %v, %d requests", stats, err, w.blob.requests()-before)
	}
	for _, f := range []file{s.files[5], s.files[8], s.files[10], s.files[14]} {
		if !w.store.Has(w.key(f.name)) {
			t.Errorf("%s is not in the store", f.name)
		}
	}
	w.wantAll(nil)
}

// A read joins what is under way, and one of something else does not wait for it.
func TestAheadDemand(t *testing.T) {
	s := build(t, many(200))
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		gate := make(chan struct{})
		w.blob.fault = func(request int, off, n int64) (f fault) {
			if request == 0 {
				f.gate = gate
			}
			return f
		}
		var work sync.WaitGroup
		work.Go(func() {
			if _, err := w.q.Ahead(context.Background(), w.wants(s.files[1:20]...), w.layer); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		w.want(s.files[150], 0, 10) // the gate is closed
		requests := w.blob.requests()
		work.Go(func() { w.want(s.files[2], 0, 10) })
		synctest.Wait()
		if got := w.blob.requests(); got != requests {
			t.Errorf("%d requests for what is under way", got-requests)
		}
		close(gate)
		work.Wait()
	})
}

// An end of the context ends Ahead, and that of the layer too.
func TestAheadEnds(t *testing.T) {
	s := build(t, many(200))
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		w.blob.fault = func(int, int64, int64) fault { return fault{hang: true} }
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { _, err := w.q.Ahead(ctx, w.wants(s.files[1:20]...), w.layer); done <- err }()
		synctest.Wait()
		cancel()
		if err := <-done; err == nil {
			t.Error("no error although the context has ended")
		}
		go func() { _, err := w.q.Ahead(t.Context(), w.wants(s.files[100:120]...), w.layer); done <- err }()
		synctest.Wait()
		w.q.Remove(w.layer)
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// Recorders write down what is read of their layers, in order, each for itself, and what continues as one touch.
func TestRecorders(t *testing.T) {
	one, two := build(t, many(30)), build(t, []file{{"only/two", noise(77, 50000)}, many(30)[1]})
	w := one.enter(t)
	second := &world{sample: two, t: t, store: w.store, q: w.q}
	second.layer, second.blob = second.add(two, "layer two")
	all, first, other := w.q.Record(), w.q.Record(w.layer), w.q.Record(second.layer)
	select {
	case <-first.Begun():
		t.Error("a recording has begun that has nothing")
	default:
	}
	w.want(one.files[5], 100, 50)
	<-first.Begun()
	second.want(two.files[0], 0, 7000)
	second.want(two.files[0], 7000, 7000)
	second.want(two.files[0], 0, 10)
	w.want(one.files[1], 0, 1000) // both have it
	key5, only, shared := w.key(one.files[5].name), second.key("only/two"), w.key(one.files[1].name)
	n := int64(len(one.files[1].data))
	check := func(name string, r *Recorder, want ...Touch) {
		t.Helper()
		got := r.Stop()
		for i := range got {
			got[i].After = 0
		}
		if len(got) != len(want) {
			t.Fatalf("%s: %v, want %v", name, got, want)
		}
		for i := range got {
			if got[i] != want[i] {
				t.Errorf("%s: touch %d is %v, want %v", name, i, got[i], want[i])
			}
		}
	}
	a, b, c, d := Touch{Key: key5, Off: 100, N: 50}, Touch{Key: only, N: 14000}, Touch{Key: only, N: 10}, Touch{Key: shared, N: min(n, 1000)}
	check("one", first, a, d)
	w.want(one.files[7], 0, 1)
	check("two", other, b, c, d)
	check("all", all, a, b, c, d, Touch{Key: w.key(one.files[7].name), N: 1})
	if w.q.recorders.Load() != nil {
		t.Error("reads still ask for recorders")
	}
	for i := range 3 * maxTouches / 2 {
		first.touch(key5, int64(2*i), 1)
	}
	if got := first.Stop(); len(got) != maxTouches {
		t.Errorf("%d touches are kept, at most %d are to be", len(got), maxTouches)
	}
}
