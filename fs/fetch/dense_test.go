package fetch

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
)

var errAway = errors.New("no answer")

func (w *world) dense() bool {
	w.q.mu.Lock()
	defer w.q.mu.Unlock()
	return w.layer.density.dense
}

// smallFiles is a layer of n files of 60 kB, in the order of their names.
func smallFiles(t *testing.T, n int) *sample {
	var files []file
	for i := range n {
		files = append(files, file{fmt.Sprintf("%04d", i), noise(uint64(i), 60_000)})
	}
	return build(t, files, estargz.WithChunkSize(1<<20))
}

// A layer that is read file by file is fetched whole before the reader comes to its end, in large requests, with nothing twice and nothing
// left compressed; the files before the first that was read come too.
func TestDense(t *testing.T) {
	s := smallFiles(t, 600)
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		w.blob.fault = func(int, int64, int64) fault { return fault{pace: time.Millisecond} }
		read := 100
		for ; read < 600 && !w.dense(); read++ {
			w.want(s.files[read], 0, 60_000)
		}
		if n := int64(read-100) * 60_000; n < denseRun-60_000 || n > 2*denseRun {
			t.Fatalf("dense after %d bytes", n)
		}
		requests := w.blob.requests()
		time.Sleep(time.Minute)
		synctest.Wait()
		if !w.q.Complete(w.layer) {
			t.Error("not all of the layer is here")
		}
		if n, bytes := w.parked(); n != 0 || bytes != 0 {
			t.Errorf("%d members of %d bytes are parked", n, bytes)
		}
		if n, most := w.blob.delivered(); most != 1 || n > w.toc.DataEnd {
			t.Errorf("%d bytes, one of them %d times", n, most)
		}
		if n := w.blob.requests() - requests; n > 36_000_000/maxRun+3 {
			t.Errorf("%d requests for the rest", n)
		}
		w.wantAll(nil)
	})
}

// Jobs that read here and there, or one large file, do not have the rest fetched.
func TestNotDense(t *testing.T) {
	large := file{"large", noise(1, 40<<20)}
	single := build(t, []file{large, {"other", noise(2, 20<<20)}}, zstdChunked(), estargz.WithChunkSize(256<<10))
	many := smallFiles(t, 1000)
	for name, read := range map[string]func(w *world){
		"large file": func(w *world) {
			for off := 0; off < len(large.data); off += 128 << 10 {
				w.want(large, int64(off), 128<<10)
			}
		},
		"sparse": func(w *world) {
			for i := 0; i < 1000; i += 10 {
				w.want(w.files[i], 0, 60_000)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := many
			if name == "large file" {
				s = single
			}
			synctest.Test(t, func(t *testing.T) {
				w := s.enter(t)
				w.blob.fault = func(int, int64, int64) fault { return fault{pace: time.Millisecond} }
				read(w)
				synctest.Wait()
				if w.dense() {
					t.Errorf("dense after %d bytes of %d", w.layer.density.asked, w.layer.density.brought)
				}
			})
		})
	}
}

// Of a dense layer that cannot be had, readers hear as of others, and it is tried again when as much more was read.
func TestDenseAway(t *testing.T) {
	s := smallFiles(t, 600)
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		var away atomic.Bool
		w.blob.fault = func(int, int64, int64) fault {
			if away.Load() {
				return fault{err: errAway}
			}
			return fault{pace: time.Millisecond}
		}
		i := 0
		for ; i < 600 && !w.dense(); i++ {
			w.want(s.files[i], 0, 60_000)
		}
		away.Store(true)
		time.Sleep(time.Hour)
		synctest.Wait()
		if w.dense() {
			t.Fatal("a layer that cannot be had counts as dense for ever")
		}
		away.Store(false)
		for ; i < 600 && !w.dense(); i++ {
			w.want(s.files[i], 0, 60_000)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if !w.q.Complete(w.layer) {
			t.Error("not all of the layer is here")
		}
	})
}

// Readers that go in no order have the rest fetched too, when they have asked for much of a layer.
func TestDenseShuffled(t *testing.T) {
	s := smallFiles(t, 600)
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		w.blob.fault = func(int, int64, int64) fault { return fault{pace: time.Millisecond} }
		read := 0
		for _, i := range rand.New(rand.NewPCG(1, 2)).Perm(600) {
			if w.dense() {
				break
			}
			w.want(s.files[i], 0, 60_000)
			read++
		}
		if read < 100 || read > 400 {
			t.Errorf("dense after %d files of 600", read)
		}
	})
}
