package fetch

import (
	"context"
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
)

// FillWhen asks before each request, and for nothing that is here.
func TestFillWhen(t *testing.T) {
	s := build(t, []file{{"one", noise(1, 12<<20)}, {"two", noise(2, 12<<20)}}, zstdChunked(), estargz.WithChunkSize(1<<20))
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		turns := 0
		stop := errors.New("stop")
		turn := func(context.Context) error {
			if turns++; turns == 3 {
				return stop
			}
			return nil
		}
		if err := w.q.FillWhen(ctx, turn, w.layer); !errors.Is(err, stop) {
			t.Error(err)
		}
		synctest.Wait()
		if n := w.blob.requests(); n != 2 {
			t.Errorf("%d requests after 2 turns", n)
		}
		if err := w.q.FillWhen(ctx, turn, w.layer); err != nil {
			t.Error(err)
		}
		n, most := w.blob.delivered()
		if requests := w.blob.requests(); requests != turns-1 || most != 1 || n > w.toc.DataEnd {
			t.Errorf("%d requests, %d turns; %d bytes, one of them %d times", requests, turns, n, most)
		}
		before := turns
		if err := w.q.FillWhen(ctx, turn, w.layer); err != nil || turns != before {
			t.Errorf("%d turns for what is here: %v", turns-before, err)
		}
	})
}

// WaitIdle counts from the last read that waited, and from what came for it; not from what fills fetch.
func TestWaitIdle(t *testing.T) {
	s := build(t, many(60))
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		begun := time.Now()
		idle := func(want time.Duration) {
			t.Helper()
			if err := w.q.WaitIdle(ctx, 30*time.Second); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(begun); took != want {
				t.Errorf("idle after %v, want %v", took, want)
			}
		}
		idle(30 * time.Second)
		idle(30 * time.Second)
		gate := make(chan struct{})
		w.blob.fault = func(n int, _, _ int64) fault {
			if n == 0 {
				return fault{gate: gate}
			}
			return fault{}
		}
		go w.want(s.files[7], 0, 10)
		time.AfterFunc(20*time.Second, func() { close(gate) })
		synctest.Wait()
		idle(80 * time.Second)
		if err := w.q.Fill(ctx, w.layer); err != nil {
			t.Fatal(err)
		}
		idle(80 * time.Second)
		w.q.Touch()
		idle(110 * time.Second)

		ended, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		w.q.Touch()
		if err := w.q.WaitIdle(ended, time.Minute); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	})
}

// A fill makes no request and takes no byte while a startup pack arrives, unless that does not end.
func TestFillYieldsToPack(t *testing.T) {
	s := build(t, []file{{"one", noise(1, 12<<20)}, {"two", noise(2, 12<<20)}}, zstdChunked(), estargz.WithChunkSize(1<<20))
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		w.blob.fault = func(int, int64, int64) fault { return fault{pace: time.Millisecond} }
		filled := make(chan error, 1)
		go func() { filled <- w.q.Fill(ctx, w.layer) }()
		time.Sleep(100 * time.Millisecond)
		never, packed := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(packed)
			w.stalledPack(s.files[len(s.files)-1], never)
		}()
		time.Sleep(10 * time.Millisecond) // reads that had begun
		requests := w.blob.requests()
		n, _ := w.blob.delivered()
		time.Sleep(packHold - time.Second)
		if after, _ := w.blob.delivered(); after != n || w.blob.requests() != requests {
			t.Errorf("%d bytes in %d requests while a pack arrived", after-n, w.blob.requests()-requests)
		}
		if err := <-filled; err != nil { // although the pack never ends
			t.Error(err)
		}
		close(never)
		<-packed
		if _, most := w.blob.delivered(); most != 1 {
			t.Errorf("a byte was fetched %d times", most)
		}
		w.wantAll(nil)
	})
}

// stalledPack takes a startup pack of a file of which nothing arrives until never is closed.
func (w *world) stalledPack(f file, never <-chan struct{}) {
	p := w.packOf(w.t, f)
	w.q.Pack(ctx, p.x, p.at, func(ctx context.Context, _ int64) (io.ReadCloser, error) {
		return io.NopCloser(stuck{ctx, never}), nil
	}, false, w.layer)
}

type stuck struct {
	ctx   context.Context
	never <-chan struct{}
}

func (s stuck) Read([]byte) (int, error) {
	select {
	case <-s.never:
	case <-s.ctx.Done():
	}
	return 0, io.EOF
}
