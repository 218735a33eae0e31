package rootfs

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"lazuli/fs/fetch"
	"lazuli/fs/store"
	"lazuli/fs/toc"
)

// A slowBlob takes a millisecond for 4 KiB, and may break.
type slowBlob struct {
	data []byte
	cut  func(request int) int64 // after how many bytes, 0 for not; nil is never

	mu       sync.Mutex
	requests [][2]int64 // offset and length
	count    []byte     // how often each byte was sent
	sent     int
}

func (b *slowBlob) Range(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	end := off + n
	if b.cut != nil {
		if cut := b.cut(len(b.requests)); cut > 0 {
			end = min(end, off+cut)
		}
	}
	b.requests = append(b.requests, [2]int64{off, n})
	return io.NopCloser(&slowAnswer{ctx, b, off, end, off + n}), nil
}

func (b *slowBlob) seen() (requests, sent int, most byte) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, n := range b.count {
		most = max(most, n)
	}
	return len(b.requests), b.sent, most
}

type slowAnswer struct {
	ctx             context.Context
	b               *slowBlob
	off, cut, whole int64
}

func (a *slowAnswer) Read(p []byte) (int, error) {
	time.Sleep(time.Millisecond)
	if a.ctx.Err() != nil {
		return 0, a.ctx.Err()
	}
	if a.off == a.cut {
		if a.cut < a.whole {
			return 0, io.ErrUnexpectedEOF
		}
		return 0, io.EOF
	}
	n := copy(p[:min(len(p), 4<<10)], a.b.data[a.off:a.cut])
	a.b.mu.Lock()
	defer a.b.mu.Unlock()
	if a.b.count == nil {
		a.b.count = make([]byte, len(a.b.data))
	}
	for i := range n {
		a.b.count[a.off+int64(i)]++
	}
	a.b.sent += n
	a.off += int64(n)
	return n, nil
}

// A passWorld is a blob and who reads it.
type passWorld struct {
	blob   *slowBlob
	passes passes
	queue  *fetch.Queue
}

func newPassWorld(t *testing.T, size int) *passWorld {
	t.Helper()
	w := &passWorld{blob: &slowBlob{data: make([]byte, size)}}
	rand.NewChaCha8([32]byte{}).Read(w.blob.data)
	dir, err := os.MkdirTemp("/dev/shm", "lazuli-test-")
	if err != nil {
		dir = t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	st, err := store.Open(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	w.queue = fetch.New(st, fetch.Options{})
	t.Cleanup(func() {
		w.passes.close()
		if err := errors.Join(w.queue.Close(), st.Close()); err != nil {
			t.Error(err)
		}
	})
	return w
}

// begin begins a pass that takes the blob's digest.
func (w *passWorld) begin(t *testing.T, key string) *pass {
	t.Helper()
	p, err := w.passes.begin(key, int64(len(w.blob.data)), func(_ context.Context, r io.Reader) (is tarReport, err error) {
		h := sha256.New()
		_, err = io.Copy(h, r)
		h.Sum(is.digest[:0])
		return is, err
	})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (w *passWorld) right(t *testing.T, p *pass) {
	t.Helper()
	if p.err != nil || p.is.digest != toc.Digest(sha256.Sum256(w.blob.data)) {
		t.Errorf("%v, %v", p.is.digest, p.err)
	}
}

func idle(w *passWorld) func(context.Context) error {
	return func(ctx context.Context) error { return w.queue.WaitIdle(ctx, idlePause) }
}

// TestPassGoesOn: a pass that is stopped goes on where it was, as does one whose stream breaks, and no byte is asked for that had come.
func TestPassGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newPassWorld(t, 11<<20+123)
		w.blob.cut = func(request int) int64 {
			if request%3 == 1 {
				return 700_001
			}
			return 0
		}
		p := w.begin(t, "a")
		for stops := 0; ; stops++ {
			ctx, stop := context.WithTimeout(t.Context(), idlePause+400*time.Millisecond)
			err := p.run(ctx, w.queue.Behind(w.blob), idle(w))
			stop()
			if err == nil {
				if stops < 3 {
					t.Errorf("it was stopped %d times: the test shows nothing", stops)
				}
				break
			}
			if !errors.Is(err, context.DeadlineExceeded) || stops > 100 {
				t.Fatal(err)
			}
			w.passes.keep(p)
			time.Sleep(time.Minute)
			if p = w.passes.take("a"); p == nil {
				t.Fatal("it was not kept")
			}
			w.queue.Touch()
		}
		w.right(t, p)
		if _, sent, most := w.blob.seen(); sent != len(w.blob.data) || most != 1 {
			t.Errorf("%d bytes of %d were sent, one of them %d times", sent, len(w.blob.data), most)
		}
	})
}

// TestPassGivesUp: a blob that does not come is asked for a few times, and the pass can be gone on with.
func TestPassGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newPassWorld(t, 5<<20)
		p := w.begin(t, "a")
		beginning := blobFunc(func(ctx context.Context, off, n int64) (io.ReadCloser, error) {
			if off == 0 {
				return w.blob.Range(ctx, off, n)
			}
			return nil, errors.New("away")
		})
		turns := 0
		turn := func(context.Context) error { turns++; return nil }
		if err := p.run(t.Context(), w.queue.Behind(beginning), turn); err == nil || turns != 1+attempts {
			t.Errorf("after %d turns: %v", turns, err)
		}
		if err := p.run(t.Context(), w.queue.Behind(w.blob), turn); err != nil {
			t.Error(err)
		}
		w.right(t, p)
		if _, sent, most := w.blob.seen(); sent != len(w.blob.data) || most != 1 {
			t.Errorf("%d bytes of %d were sent, one of them %d times", sent, len(w.blob.data), most)
		}
	})
}

type blobFunc func(ctx context.Context, off, n int64) (io.ReadCloser, error)

func (f blobFunc) Range(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	return f(ctx, off, n)
}

// TestPassWaitsItsTurn: when the link is wanted, as by a pull, the request that is under way is the last one until it has been idle again.
func TestPassWaitsItsTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newPassWorld(t, 12<<20)
		p := w.begin(t, "a")
		ended := make(chan error, 1)
		go func() { ended <- p.run(t.Context(), w.queue.Behind(w.blob), idle(w)) }()
		time.Sleep(idlePause + 600*time.Millisecond) // in the second request
		w.queue.Touch()
		begun := time.Now()
		requests, _, _ := w.blob.seen()
		time.Sleep(idlePause - time.Second)
		synctest.Wait()
		if n, sent, _ := w.blob.seen(); n != requests || sent > requests*passRun || requests != 2 {
			t.Errorf("%d requests and %d bytes, of which %d requests before the link was wanted", n, sent, requests)
		}
		if err := <-ended; err != nil || time.Since(begun) < idlePause {
			t.Errorf("after %v: %v", time.Since(begun), err)
		}
		w.right(t, p)
		for _, q := range w.blob.requests {
			if q[1] > passRun {
				t.Errorf("a request of %d bytes", q[1])
			}
		}
	})
}

// TestPassesKept: those are kept that have come furthest, and for a while.
func TestPassesKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newPassWorld(t, 1<<10)
		far := func(key string, off int64) *pass {
			p := w.begin(t, key)
			p.off = off
			w.passes.keep(p)
			return p
		}
		far("a", 300)
		b := far("b", 100)
		far("c", 200)
		<-b.done
		if !errors.Is(b.err, errForgotten) || w.passes.take("b") != nil {
			t.Errorf("the one that had come least far: %v", b.err)
		}
		if !w.passes.dropped["b"] || w.passes.dropped["a"] {
			t.Errorf("dropped: %v", w.passes.dropped)
		}
		a := w.passes.take("a")
		if a == nil || w.passes.take("a") != nil {
			t.Error("what is taken is not there any more")
		}
		time.Sleep(keptFor - time.Minute)
		w.passes.keep(a)
		time.Sleep(2 * time.Minute)
		if w.passes.take("c") != nil || w.passes.take("a") != a {
			t.Error("kept for another time than since it was stopped")
		}
		w.passes.keep(a)
		w.passes.close()
		select {
		case <-a.done:
		default:
			t.Error("it goes on after the node was closed")
		}
		if _, err := w.passes.begin("d", 1, nil); err == nil {
			t.Error("one begins after the node was closed")
		}
	})
}

// TestPassEndsEarly: who compares may have seen enough before the blob's end.
func TestPassEndsEarly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newPassWorld(t, 8<<20)
		wrong := errors.New("no tar")
		p, err := w.passes.begin("a", int64(len(w.blob.data)), func(_ context.Context, r io.Reader) (tarReport, error) {
			_, err := io.CopyN(io.Discard, r, 10_000)
			return tarReport{}, errors.Join(wrong, err)
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := p.run(t.Context(), w.queue.Behind(w.blob), idle(w)); err != nil || !errors.Is(p.err, wrong) {
			t.Errorf("%v, %v", err, p.err)
		}
		if n, sent, _ := w.blob.seen(); n != 1 || sent >= 1<<20 {
			t.Errorf("%d requests, %d bytes", n, sent)
		}
	})
}

// TestPassReader: the reader's side gives the bytes in any pieces.
func TestPassReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newPassWorld(t, 300_000)
		var got bytes.Buffer
		p, err := w.passes.begin("a", int64(len(w.blob.data)), func(_ context.Context, r io.Reader) (tarReport, error) {
			for b := make([]byte, 1); ; b = make([]byte, 1+got.Len()%9000) {
				n, err := r.Read(b)
				got.Write(b[:n])
				if err == io.EOF {
					return tarReport{}, nil
				}
				if err != nil {
					return tarReport{}, err
				}
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := p.run(t.Context(), w.queue.Behind(w.blob), idle(w)); err != nil || p.err != nil {
			t.Error(err, p.err)
		}
		if !bytes.Equal(got.Bytes(), w.blob.data) {
			t.Error("other bytes")
		}
	})
}
