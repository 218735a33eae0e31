package fetch

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func (w *world) parked() (n int, bytes int64) {
	w.q.mu.Lock()
	defer w.q.mu.Unlock()
	return w.q.lot.list.Len(), w.q.lot.bytes
}

// What a window brings stays compressed until somebody reads it, costs no request then, and is decoded when nobody has
// waited for a while.
func TestParked(t *testing.T) {
	s := build(t, many(60))
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		w.want(s.files[0], 0, 1)
		synctest.Wait()
		n, bytes := w.parked()
		if n == 0 || bytes == 0 {
			t.Fatal("nothing is parked")
		}
		requests, misses := w.blob.requests(), w.q.Stats().Misses
		var all sync.WaitGroup
		for range 4 {
			all.Go(func() { w.want(s.files[5], 0, len(s.files[5].data)) })
		}
		all.Wait()
		if got := w.blob.requests(); got != requests {
			t.Errorf("%d requests for what is parked", got-requests)
		}
		if got := w.q.Stats().Misses; got != misses {
			t.Errorf("%d reads count as misses", got-misses)
		}
		if after, _ := w.parked(); after >= n {
			t.Errorf("%d members are parked, %d were", after, n)
		}
		time.Sleep(10 * quietFor)
		synctest.Wait()
		if n, bytes := w.parked(); n != 0 || bytes != 0 {
			t.Errorf("%d members of %d bytes are parked after a quiet time", n, bytes)
		}
		w.wantAll(nil)
		synctest.Wait()
		n2, most := w.blob.delivered()
		if most > 1 || n2 > int64(len(s.blob)) {
			t.Errorf("%d bytes of %d, one of them %d times", n2, len(s.blob), most)
		}
	})
}

// Of more than fits the oldest is dropped, and fetched again when it is wanted.
func TestParkedDrops(t *testing.T) {
	s := build(t, many(60))
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		w.q.lot.limit = 20000
		w.want(s.files[0], 0, 1)
		synctest.Wait()
		if n, bytes := w.parked(); n == 0 || bytes > 20000 {
			t.Errorf("%d members of %d bytes are parked", n, bytes)
		}
		w.wantAll(nil)
	})
}

// Remove and Close drop what is parked, and a fill decodes it.
func TestParkedEnds(t *testing.T) {
	s := build(t, many(60))
	for name, end := range map[string]func(w *world){
		"remove": func(w *world) { w.q.Remove(w.layer) },
		"close":  func(w *world) { w.q.Close() },
		"fill": func(w *world) {
			if err := w.q.Fill(ctx, w.layer); err != nil {
				w.t.Error(err)
			}
			if n, most := w.blob.delivered(); most != 1 || n > int64(len(s.blob)) {
				w.t.Errorf("a byte came %d times", most)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := s.enter(t)
				w.want(s.files[0], 0, 1)
				synctest.Wait()
				if n, _ := w.parked(); n == 0 {
					t.Fatal("nothing is parked")
				}
				end(w)
				synctest.Wait()
				if n, bytes := w.parked(); n != 0 || bytes != 0 {
					t.Errorf("%d members of %d bytes are parked", n, bytes)
				}
			})
		})
	}
}

func TestLinkWindow(t *testing.T) {
	var k link
	if got := k.window(); got != firstWindow {
		t.Errorf("%d without an answer", got)
	}
	k.answered(1<<20, 20*time.Millisecond, 10*time.Millisecond) // 100 MB/s
	if got := k.window(); got < 1900<<10 || got > 2200<<10 {
		t.Errorf("%d at 20 ms and 100 MB/s", got)
	}
	for range 20 {
		k.answered(1<<20, 80*time.Millisecond, time.Second/12) // 12 MB/s
	}
	if got := k.window(); got < 900<<10 || got > 1100<<10 {
		t.Errorf("%d at 80 ms and 12 MB/s", got)
	}
	for range 20 {
		k.answered(1<<20, 100*time.Microsecond, time.Millisecond)
	}
	if got := k.window(); got != minWindow {
		t.Errorf("%d without a distance", got)
	}
	for range 20 {
		k.answered(8<<20, time.Second, time.Millisecond)
	}
	if got := k.window(); got != topWindow {
		t.Errorf("%d at the moon", got)
	}
}
