package fetch

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"golang.org/x/sys/unix"

	"lazuli/fs/store"
	"lazuli/fs/toc"
)

var ctx = context.Background()

// Every file, in any order, by any number of readers: the right bytes, and none of the blob twice.
func TestReadEverything(t *testing.T) {
	for name, opts := range map[string][]estargz.Option{
		"estargz":      nil,
		"grouped":      {estargz.WithMinChunkSize(50000)},
		"zstd:chunked": {zstdChunked()},
	} {
		s := build(t, many(120), opts...)
		for _, readers := range []int{1, 7} {
			t.Run(name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := s.enter(t)
					w.blob.fault = func(int, int64, int64) fault { return fault{pace: 100 * time.Microsecond} }
					var all sync.WaitGroup
					for i := range readers {
						all.Go(func() { w.wantAll(rand.New(rand.NewPCG(uint64(readers), uint64(i)))) })
					}
					all.Wait()
					n, most := w.blob.delivered()
					if most > 1 || n > int64(len(s.blob)) {
						t.Errorf("%d bytes of %d, one of them %d times", n, len(s.blob), most)
					}
					before := w.blob.requests()
					w.wantAll(nil)
					if after := w.blob.requests(); after != before {
						t.Errorf("%d requests for what is here", after-before)
					}
					synctest.Wait()
					if got := w.q.Stats(); got.Requests != int64(before) || got.Fetched != n || got.Errors != 0 || got.Misses == 0 {
						t.Errorf("stats %+v; %d requests, %d bytes", got, before, n)
					}
				})
			})
		}
	}
}

func TestSingleFlight(t *testing.T) {
	s := build(t, many(20))
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		gate := make(chan struct{})
		w.blob.fault = func(int, int64, int64) fault { return fault{gate: gate} }
		var all sync.WaitGroup
		for range 8 {
			all.Go(func() { w.want(s.files[7], 10, 100) })
		}
		synctest.Wait()
		if n := w.blob.requests(); n != 1 {
			t.Errorf("%d requests for one chunk", n)
		}
		if n := w.q.waiting.Load(); n != 8 {
			t.Errorf("%d readers wait", n)
		}
		close(gate)
		all.Wait()
		if n := w.blob.requests(); n != 1 {
			t.Errorf("%d requests for one chunk", n)
		}
	})
}

// One byte costs its member, and no more than the first window or the rest of a small file.
func TestOneByte(t *testing.T) {
	files := []file{{"first", noise(1, 5000)}, {"second", noise(2, 3<<20)}}
	s := build(t, files)
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		w.want(files[1], 1<<20, 1)
		synctest.Wait()
		n, _ := w.blob.delivered()
		if w.blob.requests() != 1 || n > maxRest+2*testChunk || n < testChunk/2 {
			t.Errorf("%d requests, %d bytes for one", w.blob.requests(), n)
		}
		if off := w.blob.asked[0][0]; off < 1<<20-3*testChunk || off > 1<<20+3*testChunk {
			t.Errorf("asked from byte %d of the blob", off)
		}
	})
}

// Who reads file after file backwards waits once for a window, as who reads forwards does, and nothing is fetched twice.
func TestBackwards(t *testing.T) {
	var files []file
	for i := range 80 {
		files = append(files, file{fmt.Sprintf("f%02d", i), noise(uint64(i), 100<<10)})
	}
	s := build(t, files)
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		for i := len(files) - 20; i >= 0; i-- {
			w.want(files[i], 0, 10)
			synctest.Wait() // nothing is under way when the next one is read
		}
		if n, most := w.q.Stats().Misses, int64(2+60*100<<10/minWindow); n > most {
			t.Errorf("%d reads waited, not at most %d", n, most)
		}
		if n, _ := w.blob.delivered(); n > int64(len(s.blob)) {
			t.Errorf("%d bytes of a blob of %d", n, len(s.blob))
		}
	})
}

// Reading from the beginning to the end makes few requests, with windows that grow and have a limit.
func TestSequential(t *testing.T) {
	const size = 30 << 20
	f := file{"big", noise(1, size)}
	s := build(t, []file{f}, estargz.WithChunkSize(128<<10), zstdChunked())
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		w.blob.fault = func(int, int64, int64) fault { return fault{pace: 10 * time.Microsecond} }
		most := int64(0)
		for off := int64(0); off < size; off += 128 << 10 {
			w.want(f, off, 128<<10)
			most = max(most, w.q.fetched.Load()-off)
		}
		n := w.blob.requests()
		if n > 20 {
			t.Errorf("%d requests", n)
		}
		for _, a := range w.blob.asked {
			if a[1] > maxWindow+256<<10 {
				t.Errorf("a request for %d bytes", a[1])
			}
		}
		if most < 2<<20 || most > 2*maxWindow+maxRun {
			t.Errorf("at most %d bytes ahead of the reader", most)
		}
		if _, twice := w.blob.delivered(); twice > 1 {
			t.Errorf("a byte was fetched %d times", twice)
		}
		t.Logf("%d requests, at most %d bytes ahead", n, most)
	})
}

func TestFill(t *testing.T) {
	s := build(t, many(120))
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		w.want(s.files[47], 0, 10)
		if err := w.q.Fill(ctx, w.layer); err != nil {
			t.Fatal(err)
		}
		for i := range w.layer.Table.Len() {
			if key := store.Key(w.layer.Table.At(i).Key); !w.store.Has(key) {
				t.Errorf("object %v is not here", key)
			}
		}
		n, most := w.blob.delivered()
		if most != 1 || n > w.toc.DataEnd {
			t.Errorf("%d bytes, one of them %d times", n, most)
		}
		before := w.blob.requests()
		if err := w.q.Fill(ctx, w.layer); err != nil || w.blob.requests() != before {
			t.Errorf("a second fill made %d requests: %v", w.blob.requests()-before, err)
		}
		w.wantAll(nil)
		if w.blob.requests() != before {
			t.Error("something was not filled")
		}
	})
}

// A read that waits goes before a fill: the fill takes no byte and makes no request until it is answered.
func TestFillYields(t *testing.T) {
	files := []file{{"one", noise(1, 12<<20)}, {"two", noise(2, 12<<20)}, {"wanted", noise(3, 5000)}}
	s := build(t, files, zstdChunked(), estargz.WithChunkSize(1<<20))
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		wantedAt, _ := w.member("wanted")
		gate := make(chan struct{})
		w.blob.fault = func(_ int, off, _ int64) fault {
			if off == wantedAt {
				return fault{gate: gate}
			}
			return fault{pace: time.Millisecond}
		}
		filled := make(chan error, 1)
		go func() { filled <- w.q.Fill(ctx, w.layer) }()
		time.Sleep(100 * time.Millisecond)
		before := w.blob.requests()
		read := make(chan struct{})
		go func() { w.want(files[2], 0, 5000); close(read) }()
		synctest.Wait()
		if n := w.blob.requests(); n != before+1 || w.blob.asked[n-1][0] != wantedAt {
			t.Errorf("the read is not on the wire: %d requests, then %d: %v", before, n, w.blob.asked)
		}
		time.Sleep(10 * time.Millisecond) // reads that had begun
		bytes, _ := w.blob.delivered()
		time.Sleep(5 * time.Second)
		if n, _ := w.blob.delivered(); n != bytes || w.blob.requests() != before+1 {
			t.Errorf("the fill took %d bytes while a read waited", n-bytes)
		}
		close(gate)
		<-read
		if err := <-filled; err != nil {
			t.Error(err)
		}
		if _, most := w.blob.delivered(); most != 1 {
			t.Errorf("a byte was fetched %d times", most)
		}
	})
}

// A read of what a fill has begun to fetch makes that request urgent, and no other; also while the fill waits for its turn.
func TestPromote(t *testing.T) {
	var files []file
	for i := range 4 {
		files = append(files, file{string(rune('a' + i)), noise(uint64(i), 4<<20)})
	}
	s := build(t, files, zstdChunked(), estargz.WithChunkSize(4<<20))
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		stop := make(chan struct{})
		last, _ := w.member("c")
		w.blob.fault = func(_ int, off, _ int64) fault {
			if off == last {
				return fault{}
			}
			return fault{gate: stop}
		}
		for range fillRequests { // somebody else's fills
			w.q.fillSlots <- struct{}{}
		}
		ctx, cancel := context.WithCancel(ctx)
		filled := make(chan error, 1)
		go func() { filled <- w.q.Fill(ctx, w.layer) }()
		synctest.Wait()
		if n, flying := w.blob.requests(), len(w.q.flights); n != 0 || flying != fillRequests {
			t.Fatalf("%d requests, %d flights", n, flying)
		}
		w.want(files[2], 0, 100) // the third run waits for a slot
		if n := w.blob.requests(); n != 1 || w.blob.asked[0][0] != last {
			t.Errorf("%d requests", n)
		}
		cancel()
		if err := <-filled; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		close(stop)
		for range fillRequests {
			<-w.q.fillSlots
		}
		time.Sleep(time.Second)
	})
}

// Readers get their bytes although the disk is full; a fill fails.
func TestFull(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to mount a small tmpfs")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=4m"); err != nil {
		t.Skipf("cannot mount a tmpfs: %v", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	s := build(t, many(60), estargz.WithMinChunkSize(30000))
	synctest.Test(t, func(t *testing.T) {
		w := s.enterIn(t, dir)
		fill, err := os.Create(filepath.Join(dir, "everything"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(fill, zeros{}); !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
		var all sync.WaitGroup
		for i := range 4 {
			all.Go(func() { w.wantAll(rand.New(rand.NewPCG(1, uint64(i)))) })
		}
		all.Wait()
		if got := w.q.Stats(); got.Errors > 0 {
			t.Errorf("%d reads failed", got.Errors)
		}
		if err := w.q.Fill(ctx, w.layer); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("a fill of a full disk: %v", err)
		}
		if err := errors.Join(fill.Close(), os.Remove(fill.Name())); err != nil { // somebody makes room
			t.Fatal(err)
		}
		if err := w.q.Fill(ctx, w.layer); err != nil {
			t.Error(err)
		}
		before := w.blob.requests()
		w.wantAll(nil)
		if n := w.blob.requests() - before; n > 0 {
			t.Errorf("%d requests after all is here", n)
		}
	})
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// What goes wrong on the way once is set right, and no reader sees it.
func TestOnceWrong(t *testing.T) {
	s := build(t, many(40))
	z := build(t, many(40), zstdChunked())
	for name, once := range map[string]func(off, n int64) fault{
		"refused": func(off, n int64) fault { return fault{err: errors.New("refused")} },
		"short":   func(off, n int64) fault { return fault{cut: n / 2} },
		"flipped": func(off, n int64) fault { return fault{flip: off + 100} },
		"hangs":   func(off, n int64) fault { return fault{hang: true} },
	} {
		for _, s := range []*sample{s, z} {
			t.Run(name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := s.enter(t)
					w.blob.fault = func(i int, off, n int64) fault {
						if i == 0 {
							return once(off, n)
						}
						return fault{}
					}
					w.want(s.files[17], 0, len(s.files[17].data))
					w.wantAll(nil)
					if got := w.q.Stats(); got.Errors > 0 {
						t.Errorf("%d reads failed", got.Errors)
					}
				})
			})
		}
	}
}

// A chunk that is always wrong is an error that says where; nothing of it stays, and as soon as it is right it is read.
func TestAlwaysFlipped(t *testing.T) {
	s := build(t, many(40))
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		f := s.files[17]
		start, end := w.member(f.name)
		w.blob.fault = func(int, int64, int64) fault { return fault{flip: start + 2000} }
		_, err := w.read(ctx, f.name, 0, 100)
		if err == nil {
			t.Fatal("wrong bytes were read")
		}
		digest := s.toc.Content(&s.toc.Entries[17])[0].Digest
		for _, e := range s.toc.Entries {
			if e.Name == f.name {
				digest = s.toc.Content(&e)[0].Digest
			}
		}
		if msg := err.Error(); !strings.Contains(msg, "layer one: member at byte ") || !strings.Contains(msg, digest.String()) && !strings.Contains(msg, "flate") {
			t.Errorf("the error is: %v", err)
		}
		synctest.Wait()
		times := 0
		for _, a := range w.blob.asked {
			if a[0] <= start && a[0]+a[1] >= end {
				times++
			}
		}
		if times != 2 {
			t.Errorf("asked %d times for a member that does not verify", times)
		}
		w.blob.fault = nil
		w.wantAll(nil)
	})
}

// A registry that refuses for ever is an error, and one that is back is not remembered as broken.
func TestRefused(t *testing.T) {
	s := build(t, many(40))
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		down := errors.New("registry is down")
		w.blob.fault = func(int, int64, int64) fault { return fault{err: down} }
		if _, err := w.read(ctx, s.files[17].name, 0, 100); !errors.Is(err, down) || !strings.Contains(err.Error(), "layer one") {
			t.Errorf("the error is: %v", err)
		}
		w.blob.fault = nil
		w.want(s.files[17], 0, 100)
		if got := w.q.Stats(); got.Errors != 1 {
			t.Errorf("stats %+v", got)
		}
	})
}

// A blob that hangs is an error after ReadTimeout, and nothing of it is left when it does not any more.
func TestHangs(t *testing.T) {
	s := build(t, many(40))
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		var hang atomic.Bool
		hang.Store(true)
		w.blob.fault = func(int, int64, int64) fault { return fault{hang: hang.Load()} }
		begin := time.Now()
		_, err := w.read(ctx, s.files[17].name, 0, 100)
		if err == nil || !strings.Contains(err.Error(), "layer one: no answer within 1m0s") || time.Since(begin) != time.Minute {
			t.Errorf("after %v: %v", time.Since(begin), err)
		}
		hang.Store(false)
		begin = time.Now()
		w.want(s.files[17], 0, 100)
		if took := time.Since(begin); took > time.Minute {
			t.Errorf("%v after the network is back", took)
		}
	})
}

// Who asked first gives up; the fetch goes on for the others.
func TestGiveUp(t *testing.T) {
	s := build(t, many(40))
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		gate := make(chan struct{})
		w.blob.fault = func(int, int64, int64) fault { return fault{gate: gate} }
		ctx, cancel := context.WithCancel(ctx)
		gone := make(chan error, 1)
		go func() { _, err := w.read(ctx, s.files[17].name, 0, 100); gone <- err }()
		synctest.Wait()
		read := make(chan struct{})
		go func() { w.want(s.files[17], 0, 100); close(read) }()
		synctest.Wait()
		cancel()
		if err := <-gone; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		close(gate)
		<-read
		if n := w.blob.requests(); n != 1 {
			t.Errorf("%d requests", n)
		}
	})
}

// Close ends reads that wait, fills, and retries.
func TestClose(t *testing.T) {
	s := build(t, many(40))
	for name, f := range map[string]fault{"hangs": {hang: true}, "refuses": {err: errors.New("refused")}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := s.enter(t)
				w.blob.fault = func(int, int64, int64) fault { return f }
				results := make(chan error, 2)
				go func() { _, err := w.read(ctx, s.files[17].name, 0, 100); results <- err }()
				go func() { results <- w.q.Fill(ctx, w.layer) }()
				synctest.Wait()
				begin := time.Now()
				w.q.Close()
				for range 2 {
					if err := <-results; !errors.Is(err, errClosed) {
						t.Errorf("the error is %v", err)
					}
				}
				if took := time.Since(begin); took > 0 {
					t.Errorf("Close took %v", took)
				}
				if _, err := w.read(ctx, s.files[17].name, 0, 100); err == nil {
					t.Error("read after Close")
				}
			})
		})
	}
}

// An image is removed while its object is read; another image has the object too.
func TestRemove(t *testing.T) {
	s := build(t, many(40))
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		f := s.files[17]
		w.blob.fault = func(int, int64, int64) fault { return fault{hang: true} }
		other, otherBlob := w.add(s, "layer two")
		id, size, ok := w.q.Lookup(s.key(f.name))
		if !ok || size != int64(len(f.data)) {
			t.Fatalf("lookup: %d, %v", size, ok)
		}
		o, err := w.q.Open(id)
		if err != nil {
			t.Fatal(err)
		}
		read := make(chan struct{})
		go func() { w.want(f, 0, 100); close(read) }()
		synctest.Wait()
		w.q.Remove(w.layer)
		<-read
		n := w.blob.requests()
		w.want(f, 20000, 100)
		if w.blob.requests() != n || otherBlob.requests() == 0 {
			t.Error("a removed layer is asked")
		}
		w.q.Remove(other)
		if _, _, ok := w.q.Lookup(s.key(f.name)); ok {
			t.Error("found in no layer")
		}
		if _, err := w.q.Open(id); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("opened from no layer: %v", err)
		}
		o.Close()
	})
}

// What is on its way when the last image that has it goes is no fault of the store's, and nothing to warn of.
func TestRemoveUnderway(t *testing.T) {
	s := build(t, many(40))
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		var log bytes.Buffer
		w.q.log = slog.New(slog.NewTextHandler(&log, nil))
		f := s.files[17]
		start, _ := w.member(f.name)
		o, _ := w.layer.Table.Find(toc.Digest(w.key(f.name)))
		c, member := o.Chunk(0)
		w.q.Remove(w.layer)
		fl := &flight{id: memberID{w.layer, member}, refs: []toc.Ref{{Object: o}}}
		if err := w.q.land(fl, bytes.NewReader(s.blob[start:])); err != nil {
			t.Fatal(err)
		}
		if got := fl.chunk(w.key(f.name), 0); !bytes.Equal(got, f.data[:c.Size]) {
			t.Error("a reader who waited does not get his bytes")
		}
		if log.Len() > 0 {
			t.Errorf("logged: %s", &log)
		}
	})
}

// What is removed from the store is fetched again.
func TestEvicted(t *testing.T) {
	s := build(t, many(40))
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		w.wantAll(nil)
		w.q.Remove(w.layer) // files that are open would go on
		w.layer.ctx = nil
		if err := w.q.Add(w.layer); err != nil {
			t.Fatal(err)
		}
		for i := range w.layer.members { // as if nothing had happened in between
			w.layer.members[i].Store(true)
		}
		if _, err := w.store.Prune(func(store.Key) bool { return false }); err != nil {
			t.Fatal(err)
		}
		before := w.blob.requests()
		w.wantAll(nil)
		if got := w.q.Stats(); got.Errors > 0 || w.blob.requests() == before {
			t.Errorf("%d errors, %d requests", got.Errors, w.blob.requests()-before)
		}
	})
}

// Another process publishes an object that this one has begun.
func TestOtherProcess(t *testing.T) {
	s := build(t, many(40))
	dir := tempDir(t)
	synctest.Test(t, func(t *testing.T) {
		w := s.enterIn(t, dir)
		f := file{s.files[37].name, s.files[37].data} // several chunks
		w.blob.fault = func(_ int, off, n int64) fault { return fault{cut: 1 + testChunk*3/2} }
		w.want(f, 0, 10)
		x := s.enterIn(t, dir)
		x.want(f, 0, len(f.data))
		if !w.store.Has(s.key(f.name)) {
			t.Fatal("not published")
		}
		w.blob.fault = func(int, int64, int64) fault { return fault{err: errors.New("asked for what is here")} }
		w.want(f, 0, len(f.data))
	})
}

func TestHoles(t *testing.T) {
	zero, mixed, after := file{"zero", make([]byte, 25000)}, file{"mixed", make([]byte, 25000)}, file{"after", noise(9, 500)}
	one := file{"one", make([]byte, 300)}
	copy(mixed.data[testChunk:], noise(1, testChunk))
	s := build(t, []file{zero, mixed, one, after})
	for i := range s.toc.Chunks {
		c := &s.toc.Chunks[i]
		if c.Digest == toc.Digest(sha(make([]byte, c.Size))) {
			*c = toc.Chunk{FileOffset: c.FileOffset, Size: c.Size, Hole: true}
		}
	}
	s.marshal(t)
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		w.want(zero, 0, 25000)
		w.want(one, 100, 25000)
		w.want(mixed, 0, 100)
		if n := w.blob.requests(); n > 0 {
			t.Errorf("%d requests for holes", n)
		}
		if !w.store.Has(s.key("zero")) || !w.store.Has(s.key("one")) {
			t.Error("a file of zeros is not in the store")
		}
		w.want(mixed, 0, 25000)
		w.want(after, 0, 500)
		if !w.store.Has(s.key("mixed")) {
			t.Error("a file with holes is not in the store")
		}
		w.wantAll(nil)
	})
}

// An ordinary layer is fetched whole, once for all who wait, and again when its objects are gone.
func TestWhole(t *testing.T) {
	files := many(40)
	tarball := makeTar(t, files)
	type chunk struct {
		c toc.Chunk
		p []byte
	}
	var chunks []chunk
	layer, err := toc.FromTar(bytes.NewReader(tarball), testChunk, func(c toc.Chunk, p []byte) error {
		chunks = append(chunks, chunk{c, bytes.Clone(p)})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	s := &sample{files: files, toc: layer}
	s.marshal(t)
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		times, broken := 0, errors.New("no network")
		w.layer.Whole = func(ctx context.Context) error {
			times++
			time.Sleep(10 * time.Second)
			if times == 1 {
				return broken
			}
			for _, e := range layer.Entries {
				if e.Size == 0 {
					continue
				}
				for _, f := range files {
					if f.name == e.Name {
						if err := w.store.Put(store.Key(toc.ObjectKey(layer.Content(&e))), f.data); err != nil {
							return err
						}
					}
				}
			}
			return nil
		}
		if _, err := w.read(ctx, files[7].name, 0, 10); !errors.Is(err, broken) {
			t.Errorf("the error is %v", err)
		}
		var all sync.WaitGroup
		for range 5 {
			all.Go(func() { w.wantAll(nil) })
		}
		all.Wait()
		if times != 2 {
			t.Errorf("fetched %d times", times-1)
		}
		w.q.Remove(w.layer)
		w.q.Add(w.layer)
		w.store.Prune(func(store.Key) bool { return false })
		w.want(files[37], 0, 30000)
		if err := w.q.Fill(ctx, w.layer); err != nil || times != 3 {
			t.Errorf("fetched %d times: %v", times-1, err)
		}
	})
}

// A member too large to be held in memory, with others behind it in the same request.
func TestLargeMember(t *testing.T) {
	files := []file{{"large", noise(1, maxBuffered+100000)}, {"b", noise(2, 5000)}, {"c", noise(3, 5000)}}
	for name, opt := range map[string]estargz.Option{"gzip": estargz.WithCompressionLevel(1), "zstd": zstdChunked()} {
		s := build(t, files, opt, estargz.WithChunkSize(32<<20))
		for _, cut := range []int64{0, 5 << 20} {
			t.Run(name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := s.enter(t)
					w.blob.fault = func(i int, _, _ int64) fault {
						if i == 0 {
							return fault{cut: cut}
						}
						return fault{}
					}
					w.want(files[0], 1<<20, 100)
					for _, f := range files {
						w.want(f, 0, len(f.data))
					}
					if n := w.blob.requests(); cut == 0 && n != 1 {
						t.Errorf("%d requests", n)
					}
				})
			})
		}
	}
}

// A damaged chunk table is an error, and never a wrong byte or a panic.
func TestDamagedTable(t *testing.T) {
	s := build(t, []file{{"a", noise(1, 25000)}, {"b", noise(2, 25000)}, {"c", noise(3, 400)}})
	good, err := os.ReadFile(s.path)
	if err != nil {
		t.Fatal(err)
	}
	le := binary.LittleEndian
	objects, chunks := int(le.Uint32(good[12:])), int(le.Uint32(good[16:]))
	const header, object, chunk = 64, 48, 64
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 40 {
		bad := bytes.Clone(good)
		// Of a chunk: digest, file offset, size, inner offset.
		at := header + objects*object + rnd.IntN(chunks)*chunk + rnd.IntN(56)
		bad[at] ^= 1 << rnd.IntN(8)
		body := len(bad) - 4 // the checksum is made right, to see what stands behind it
		le.PutUint32(bad[body:], crc32.Checksum(bad[:body], crc32.MakeTable(crc32.Castagnoli)))
		s := *s
		s.path = filepath.Join(t.TempDir(), "table")
		if err := os.WriteFile(s.path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		synctest.Test(t, func(t *testing.T) {
			w := s.enter(t)
			for _, f := range s.files {
				got, err := w.read(ctx, f.name, 0, len(f.data))
				if err == nil && !bytes.Equal(got, f.data) {
					t.Errorf("byte %d: wrong bytes of %s", at, f.name)
				}
			}
		})
	}
}

func TestBadOffsets(t *testing.T) {
	s := build(t, []file{{"a", noise(1, 25000)}})
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		if _, err := w.read(ctx, "a", -1, 10); err == nil {
			t.Error("read before the beginning")
		}
		if b, err := w.read(ctx, "a", 25000, 10); err != nil || len(b) > 0 {
			t.Errorf("read behind the end: %d bytes, %v", len(b), err)
		}
		if b, err := w.read(ctx, "a", 24990, 100); err != nil || len(b) != 10 {
			t.Errorf("read across the end: %d bytes, %v", len(b), err)
		}
	})
}

// An object of the store that lost its end is an error, not a file of zeros.
func TestTruncatedObject(t *testing.T) {
	s := build(t, []file{{"a", noise(1, 5000)}})
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		w.want(s.files[0], 0, 5000)
		w.q.Remove(w.layer)
		w.q.Add(w.layer)
		if err := os.Truncate(filepath.Join(w.store.Objects(), s.key("a").Path()), 100); err != nil {
			t.Fatal(err)
		}
		if b, err := w.read(ctx, "a", 0, 5000); err == nil {
			t.Errorf("read %d bytes", len(b))
		}
	})
}

// Files that nobody reads do not stay open for ever.
func TestOpenFiles(t *testing.T) {
	var files []file
	for i := range openObjects + 100 {
		files = append(files, file{string(rune('a'+i%26)) + strings.Repeat("x", i/26), noise(uint64(i), 10)})
	}
	s := build(t, files)
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		w.wantAll(nil)
		if n := len(w.q.objects); n != openObjects || w.q.unused.Len() != n {
			t.Errorf("%d objects open, %d unused", n, w.q.unused.Len())
		}
	})
}

// Reading what is here makes no garbage; fetching a chunk makes little, whatever its size.
func TestAllocations(t *testing.T) {
	s := build(t, []file{{"a", noise(1, 250000)}, {"b", noise(2, 200)}})
	w := s.enter(t)
	w.wantAll(nil)
	id, _, _ := w.q.Lookup(s.key("a"))
	p := make([]byte, 4096)
	if n := testing.AllocsPerRun(100, func() {
		o, err := w.q.Open(id)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := o.ReadAt(ctx, p, 8192); err != nil {
			t.Fatal(err)
		}
		o.Close()
	}); n > 2 {
		t.Errorf("%v allocations for a read of what is here", n)
	}
	if n := testing.AllocsPerRun(100, func() { w.q.Lookup(s.key("a")) }); n > 50 {
		t.Errorf("%v allocations for a lookup", n)
	}
}

func BenchmarkFill(b *testing.B) {
	s := build(b, []file{{"a", noise(1, 32<<20)}}, zstdChunked(), estargz.WithChunkSize(128<<10))
	b.SetBytes(int64(len(s.files[0].data)))
	b.ReportAllocs()
	for b.Loop() {
		w := s.enter(b)
		if err := w.q.Fill(ctx, w.layer); err != nil {
			b.Fatal(err)
		}
	}
}
