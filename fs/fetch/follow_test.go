package fetch

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"lazuli/fs/store"
	"lazuli/fs/toc"
)

// What is brought comes in few requests, stays compressed, and is read without any other; none of it counts as a read.
func TestBring(t *testing.T) {
	s := build(t, many(200))
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		near := []file{s.files[4], s.files[2], s.files[9], s.files[17]}
		wants := append(w.wants(near...), Want{store.Key{1}, 0}, Want{w.key(s.files[1].name), 99})
		if stats := w.q.Bring(wants, w.layer); stats.Runs != 1 || stats.Chunks != len(wants)-2 {
			t.Errorf("%+v", stats)
		}
		synctest.Wait()
		for _, f := range near {
			if w.store.Has(w.key(f.name)) {
				t.Errorf("%s was decoded", f.name)
			}
		}
		if stats := w.q.Bring(wants, w.layer); stats.Runs != 0 {
			t.Errorf("again: %+v", stats)
		}
		if got := w.q.Stats(); w.blob.requests() != 1 || got.Misses != 0 || w.q.reads.Load() != 0 {
			t.Errorf("%d requests, %+v", w.blob.requests(), got)
		}
		for _, f := range near {
			w.want(f, 0, len(f.data))
		}
		if got := w.q.Stats(); w.blob.requests() != 1 || got.Misses != 0 {
			t.Errorf("%d requests, %+v", w.blob.requests(), got)
		}
		w.wantAll(nil)
		synctest.Wait()
		if n, most := w.blob.delivered(); most > 1 || n > int64(len(s.blob)) {
			t.Errorf("%d bytes of %d, one of them %d times", n, len(s.blob), most)
		}
	})
}

// The members around what is brought come with it, up to a bound and up to what is here.
func TestBringWidens(t *testing.T) {
	files := many(400)
	for i := range files {
		files[i].data = noise(uint64(i), 9000)
	}
	s := build(t, files)
	w := s.enter(t)
	n := func(f file) int {
		o, _ := w.layer.Table.Find(toc.Digest(w.key(f.name)))
		_, m := o.Chunk(0)
		return m
	}
	q := w.q
	window := q.link.window() / 8
	a := &stretch{layer: w.layer, wanted: []int{n(files[200])}}
	q.widen(a, window)
	from, _ := w.layer.Table.Member(a.wanted[0])
	_, to := w.layer.Table.Member(a.wanted[len(a.wanted)-1])
	start, end := w.layer.Table.Member(n(files[200]))
	if start-from > window || start-from < window-20000 || to-end > window || to-end < window-20000 {
		t.Errorf("%d bytes before it and %d behind it, of %d", start-from, to-end, window)
	}
	for i := 1; i < len(a.wanted); i++ {
		if a.wanted[i] != a.wanted[i-1]+1 {
			t.Fatalf("members %d and %d", a.wanted[i-1], a.wanted[i])
		}
	}
	if err := q.Glance(t.Context(), w.key(files[198].name), make([]byte, 1), 0, w.layer); err != nil {
		t.Fatal(err)
	}
	b := &stretch{layer: w.layer, wanted: []int{n(files[200])}}
	q.widen(b, window)
	if b.wanted[0] != n(files[198])+1 {
		t.Errorf("from member %d on, and %d is here", b.wanted[0], n(files[198]))
	}
}

// A glance brings the chunks that it needs and nothing else, joins what is under way, and counts as no read.
func TestGlance(t *testing.T) {
	s := build(t, many(60))
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		f := s.files[47] // of several chunks
		glance := func(ctx context.Context, off, n int) error {
			p := make([]byte, n)
			err := w.q.Glance(ctx, w.key(f.name), p, int64(off), w.layer)
			if err == nil && !bytes.Equal(p, f.data[off:off+n]) {
				t.Errorf("wrong bytes at %d", off)
			}
			return err
		}
		if err := glance(t.Context(), testChunk-10, 20); err != nil {
			t.Error(err)
		}
		if got := w.q.Stats(); w.blob.requests() != 1 || got.Misses != 0 || got.Needed != 0 || w.q.reads.Load() != 0 {
			t.Errorf("%d requests, %+v", w.blob.requests(), got)
		}
		// What was brought is decoded for it, arrived or not.
		gate := make(chan struct{})
		w.blob.fault = func(int, int64, int64) fault { return fault{gate: gate} }
		w.q.Bring(w.wants(f), w.layer)
		done := make(chan error)
		go func() { done <- glance(t.Context(), 0, len(f.data)) }()
		synctest.Wait()
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		if err := glance(short, 3*testChunk, 1); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("before it has come: %v", err)
		}
		cancel()
		close(gate)
		if err := <-done; err != nil {
			t.Error(err)
		}
		if err := glance(t.Context(), 3*testChunk, 1); err != nil || w.blob.requests() != 2 {
			t.Errorf("%v, %d requests", err, w.blob.requests())
		}
		for _, p := range [][2]int{{-1, 1}, {len(f.data), 1}, {len(f.data) - 1, 2}} {
			if err := w.q.Glance(t.Context(), w.key(f.name), make([]byte, p[1]), int64(p[0]), w.layer); err == nil {
				t.Errorf("%d bytes at %d of %d", p[1], p[0], len(f.data))
			}
		}
		if err := w.q.Glance(t.Context(), store.Key{1}, make([]byte, 1), 0, w.layer); err == nil {
			t.Error("an object that no layer has")
		}
	})
}

// Who follows a recording hears of each read once, and is not waited for.
func TestRecorderMore(t *testing.T) {
	s := build(t, many(20))
	w := s.enter(t)
	r := w.q.Record(w.layer)
	defer r.Stop()
	for _, f := range []file{s.files[1], s.files[2]} {
		w.want(f, 0, len(f.data))
	}
	<-r.More()
	got := r.From(0)
	if len(got) != 2 || got[0].Key != w.key(s.files[1].name) || got[1].Key != w.key(s.files[2].name) {
		t.Errorf("%v", got)
	}
	select {
	case <-r.More():
		t.Error("more of what was returned")
	default:
	}
	w.want(s.files[4], 0, 1)
	<-r.More()
	if got := r.From(2); len(got) != 1 || len(r.From(9)) != 0 {
		t.Errorf("%v", got)
	}
}
