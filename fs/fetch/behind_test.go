package fetch

import (
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"

	"lazuli/fs/store"
	"lazuli/fs/toc"
)

// TestBehindYields: of a blob that is read as a whole nothing is taken from the link while a demand read waits, beyond the read that had begun.
func TestBehindYields(t *testing.T) {
	s := build(t, []file{{"one", noise(1, 12<<20)}, {"two", noise(2, 12<<20)}}, zstdChunked(), estargz.WithChunkSize(1<<20))
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		const size, piece = 4 << 20, 64 << 10
		came := make(chan struct{})
		w.blob.fault = func(_ int, off, _ int64) fault {
			if off > 0 { // the demand read
				return fault{gate: came}
			}
			return fault{pace: time.Millisecond}
		}
		// The bytes of the range that was read behind.
		behind := func() (n int) {
			w.blob.mu.Lock()
			defer w.blob.mu.Unlock()
			for _, c := range w.blob.count[:size] {
				n += int(c)
			}
			return n
		}
		read := make(chan error, 1)
		go func() {
			body, err := w.q.Behind(w.blob).Range(ctx, 0, size)
			if err == nil {
				defer body.Close()
				_, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, body, make([]byte, piece))
			}
			read <- err
		}()
		time.Sleep(100 * time.Millisecond)
		before := behind()
		wanted := make(chan struct{})
		go func() { defer close(wanted); w.want(s.files[1], 6<<20, 10) }()
		time.Sleep(10 * time.Second)
		if n := behind() - before; before == 0 || n > piece {
			t.Errorf("%d bytes after %d while somebody waited", n, before)
		}
		close(came)
		<-wanted
		if err := <-read; err != nil {
			t.Error(err)
		}
		if n := behind(); n != size {
			t.Errorf("%d bytes of %d", n, size)
		}
		if w.q.Stats().Misses != 1 {
			t.Errorf("%+v", w.q.Stats())
		}
	})
}

// TestOffer: what came in another way is put into the store if it is the chunk that it is said to be, and is then not fetched.
func TestOffer(t *testing.T) {
	s := build(t, []file{{"large", noise(1, 3*testChunk+7)}, {"small", noise(2, 77)}})
	w := s.enter(t)
	offer := func(name string, i int, p []byte) error {
		sum, err := w.q.Offer(w.key(name), i, p)
		if sum != toc.Digest(sha(p)) {
			t.Errorf("%s: digest %v", name, sum)
		}
		return err
	}
	large, small := s.files[0].data, s.files[1].data
	for i := range 4 {
		if !w.q.Lacks(w.key("large"), i) {
			t.Errorf("chunk %d is here", i)
		}
		p := large[i*testChunk : min((i+1)*testChunk, len(large))]
		for _, wrong := range [][]byte{nil, p[1:], append([]byte{p[0] ^ 1}, p[1:]...), small} {
			if offer("large", i, wrong) == nil || !w.q.Lacks(w.key("large"), i) {
				t.Errorf("chunk %d: wrong bytes were taken", i)
			}
		}
		if offer("large", i+1, p) == nil || offer("large", -1, p) == nil {
			t.Errorf("chunk %d is taken for another", i)
		}
		if err := offer("large", i, p); err != nil || w.q.Lacks(w.key("large"), i) {
			t.Errorf("chunk %d: %v", i, err)
		}
	}
	if err := offer("small", 0, small); err != nil || w.q.Lacks(w.key("small"), 0) || !w.store.Has(w.key("small")) {
		t.Error("the small file:", err)
	}
	nobodys := store.Key(sha(small))
	if _, err := w.q.Offer(nobodys, 0, small); err == nil || w.q.Lacks(nobodys, 0) {
		t.Error("an object that no layer has was taken")
	}
	w.wantAll(nil)
	if n := w.blob.requests(); n != 0 || !w.q.Complete(w.layer) {
		t.Errorf("%d requests for what is here", n)
	}
}
