package fetch

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"lazuli/fs/pack"
	"lazuli/fs/toc"
)

// A startup is a pack of a layer, in a blob with switches.
type startup struct {
	*blob
	x     *pack.Index
	at    int64
	stall int64         // if above 0, byte of the pack from where on nothing comes,
	trick time.Duration // or if above 0 too, one byte after each time
}

// packOf makes a pack of files of the layer, in their order.
func (s *sample) packOf(t testing.TB, files ...file) *startup {
	t.Helper()
	b := pack.Builder{FrameSize: 64 << 10}
	for _, f := range files {
		for i := range s.toc.Entries {
			e := &s.toc.Entries[i]
			if e.Name != f.name || len(f.data) == 0 {
				continue
			}
			chunks := s.toc.Content(e)
			for i, c := range chunks {
				if err := b.Chunk(toc.ObjectKey(chunks), i, f.name, f.data[c.FileOffset:c.FileOffset+c.Size]); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	var out bytes.Buffer
	if _, err := b.WriteTo(&out); err != nil {
		t.Fatal(err)
	}
	return parsePack(t, out.Bytes())
}

func parsePack(t testing.TB, data []byte) *startup {
	t.Helper()
	x, err := pack.ReadIndex(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	return &startup{blob: &blob{data: data}, x: x, at: x.Start}
}

func (p *startup) open(ctx context.Context, off int64) (io.ReadCloser, error) {
	body, err := p.Range(ctx, off, int64(len(p.data))-off)
	if err == nil && p.stall > 0 {
		body = &stalled{ctx, io.LimitReader(body, max(p.stall-off, 0)), body, p.trick}
	}
	return body, err
}

// A stalled brings nothing more from a byte on, and does not end; or very little.
type stalled struct {
	ctx context.Context
	io.Reader
	rest  io.ReadCloser
	trick time.Duration
}

func (s *stalled) Read(p []byte) (int, error) {
	n, err := s.Reader.Read(p)
	if err != io.EOF {
		return n, err
	}
	if s.trick > 0 {
		time.Sleep(s.trick)
		return s.rest.Read(p[:1])
	}
	<-s.ctx.Done()
	return 0, s.ctx.Err()
}

func (s *stalled) Close() error { return nil }

// frame returns where frame i begins in the pack.
func (p *startup) frame(i int) int64 {
	at := p.at
	for _, f := range p.x.Frames[:i] {
		at += int64(f.Size)
	}
	return at
}

// take has the queue take the pack.
func (w *world) take(p *startup) (PackStats, error) {
	return w.q.Pack(ctx, p.x, p.at, p.open, false, w.layer)
}

// nothingLeft shows that no pack is expected any more.
func (w *world) nothingLeft() {
	w.t.Helper()
	w.q.mu.Lock()
	defer w.q.mu.Unlock()
	if n := len(w.q.packs); n > 0 {
		w.t.Errorf("%d chunks of packs are still expected", n)
	}
}

// equal returns n files of the same size.
func equal(n, size int) []file {
	files := make([]file, n)
	for i := range files {
		files[i] = file{fmt.Sprintf("f%03d", i), noise(uint64(i), size)}
	}
	return files
}

// What a pack brought costs one request, that of the pack, and none of the layer.
func TestPack(t *testing.T) {
	s := build(t, many(120))
	p := s.packOf(t, s.files...)
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		got, err := w.take(p)
		if err != nil || got.Bad > 0 || got.Here > 0 || got.Bytes != int64(len(p.data))-p.at {
			t.Errorf("%+v, %v", got, err)
		}
		w.nothingLeft()
		w.wantAll(rand.New(rand.NewPCG(1, 2)))
		if w.blob.requests() != 0 || p.requests() != 1 {
			t.Errorf("%d requests of the layer, %d of the pack", w.blob.requests(), p.requests())
		}
		if st := w.q.Stats(); st.Misses != 0 || st.Requests != 1 || st.Fetched != got.Bytes {
			t.Errorf("%+v", st)
		}
		if got, err := w.take(p); err != nil || got.Here != got.Chunks || got.Bytes != 0 || p.requests() != 1 {
			t.Errorf("again: %+v, %v, %d requests", got, err, p.requests())
		}
	})
}

// Reads wait for what comes soon and ask for nothing, whoever many they are; what comes late they ask for at once.
func TestPackWaits(t *testing.T) {
	s := build(t, equal(60, 60000))
	p := s.packOf(t, s.files...) // a frame per file, 15 ms each
	p.fault = func(int, int64, int64) fault { return fault{pace: time.Millisecond} }
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		var all sync.WaitGroup
		all.Go(func() {
			if st, err := w.take(p); err != nil || st.Bad > 0 {
				t.Errorf("%+v, %v", st, err)
			}
		})
		time.Sleep(20 * time.Millisecond)
		for i := range 8 {
			all.Go(func() { w.want(s.files[i], 100, 40000) })
			all.Go(func() { w.want(s.files[i], 0, 60000) })
		}
		time.Sleep(20 * time.Millisecond)
		if n, waiting := w.blob.requests(), w.q.waiting.Load(); n != 0 || waiting == 0 {
			t.Errorf("%d requests for what comes soon, %d reads wait", n, waiting)
		}
		begun := time.Now()
		w.want(s.files[55], 0, 10)
		if n, took := w.blob.requests(), time.Since(begun); n != 1 || took > 0 {
			t.Errorf("%d requests for what comes late, after %v", n, took)
		}
		all.Wait()
		if n := w.blob.requests(); n != 1 || p.requests() != 1 {
			t.Errorf("%d requests of the layer, %d of the pack", n, p.requests())
		}
		w.wantAll(nil)
		if n := w.blob.requests(); n != 1 {
			t.Errorf("%d requests after the pack", n)
		}
		w.nothingLeft()
	})
}

// However bad a pack is, every read is right, nothing stays behind, and a start is not much slower than without a pack.
func TestPackBad(t *testing.T) {
	files := equal(40, 60000)
	s := build(t, files)
	other := build(t, equal(50, 61000))
	whole := s.packOf(t, files...)
	size := int64(len(whole.data))
	lie := func(field int, delta uint32) func(*startup) {
		return func(p *startup) {
			for i := range p.x.Frames { // sizes that another pack could have
				at := 24 + 12*i + field
				le := binary.LittleEndian
				le.PutUint32(p.data[at:], le.Uint32(p.data[at:])+delta)
			}
			*p = *parsePack(t, p.data)
		}
	}
	for name, c := range map[string]struct {
		change func(*startup)
		pack   *startup
		err    bool
		quiet  bool // nothing of it is read but the index
	}{
		"slow": {change: func(p *startup) { p.fault = func(int, int64, int64) fault { return fault{pace: time.Second} } }},
		"slower": {change: func(p *startup) {
			p.fault = func(int, int64, int64) fault { return fault{pace: 30 * time.Millisecond} }
		}},
		"refused":         {change: func(p *startup) { p.fault = func(int, int64, int64) fault { return fault{err: errors.New("no")} } }, err: true},
		"silent":          {change: func(p *startup) { p.stall = 1 }},
		"stalls":          {change: func(p *startup) { p.stall = p.frame(20) + 10 }},
		"trickles":        {change: func(p *startup) { p.stall, p.trick = p.frame(20), 100*time.Millisecond }},
		"truncated":       {change: func(p *startup) { p.fault = func(_ int, off, _ int64) fault { return fault{cut: max(size/2-off, 1)} } }, err: true},
		"flipped":         {change: func(p *startup) { flipAll(p.data[p.at:]) }, err: true},
		"flipped once":    {change: func(p *startup) { p.data[p.frame(20)+1000] ^= 1 }},
		"another image":   {pack: other.packOf(t, other.files...), err: true, quiet: true},
		"inflated lies":   {change: lie(4, 1), err: true, quiet: true},
		"compressed lies": {change: func(p *startup) { lie(0, ^uint32(6))(p) }, err: true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start := func(p *startup) time.Duration {
					w := s.enter(t)
					w.blob.fault = func(int, int64, int64) fault { return fault{pace: 100 * time.Microsecond} }
					w.layer.packed.Store(false)
					ctx, cancel := context.WithCancel(ctx)
					done := make(chan struct{})
					var stats PackStats
					var err error
					go func() {
						defer close(done)
						if p != nil {
							stats, err = w.q.Pack(ctx, p.x, p.at, p.open, false, w.layer)
						}
					}()
					synctest.Wait()
					begun := time.Now()
					w.wantAll(nil)
					took := time.Since(begun)
					cancel()
					<-done
					if p == nil {
						return took
					}
					if c.err && err == nil {
						t.Errorf("no error: %+v", stats)
					}
					if c.quiet && p.requests() > 0 {
						t.Errorf("%d requests for a pack that cannot be right", p.requests())
					}
					if w.blob.requests() == 0 {
						t.Error("nothing was fetched")
					}
					if st := w.q.Stats(); st.Errors > 0 {
						t.Errorf("%d reads failed", st.Errors)
					}
					if (err != nil || stats.Bad > 0) && w.layer.packed.Load() {
						t.Error("the layer counts as packed")
					}
					w.nothingLeft()
					return took
				}
				p := c.pack
				if p == nil {
					p = parsePack(t, bytes.Clone(whole.data))
				}
				if c.change != nil {
					c.change(p)
				}
				without := start(nil)
				// Reads one after the other, the worst: each waits in vain at most maxVain times.
				if with := start(p); with > without*6/5+maxVain*3*packPatience+packPatience {
					t.Errorf("%v, without the pack %v", with, without)
				}
			})
		})
	}
}

// A pack that came fast and then trickles looks fast for long; reads do not wait for it more than a few times all the same.
func TestPackVain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &packed{begun: time.Now(), link: &link{rate: 1}} // the link is no faster
		time.Sleep(time.Second)
		p.came(100 << 20)
		waits := 0
		for i := range int64(100) {
			for range 3 { // of each frame, one read after the other
				f := &flight{pack: p, end: 100<<20 + (i+1)<<16, done: make(chan struct{})}
				if _, soon := p.soon(f.end); soon {
					waits++
					if f.waitPack(ctx) {
						t.Fatal("it came")
					}
				}
				p.came(p.arrived.Load() + 1)
			}
		}
		if waits != maxVain || p.moving() {
			t.Errorf("%d reads waited, want %d", waits, maxVain)
		}
		if _, soon := p.soon(p.arrived.Load()); !soon {
			t.Error("what has arrived is not waited for")
		}
	})
}

func flipAll(p []byte) {
	for i := 0; i < len(p); i += 500 {
		p[i] ^= 0x55
	}
}

// A stream that breaks is gone on with where it broke.
func TestPackBreaks(t *testing.T) {
	s := build(t, equal(20, 60000))
	p := s.packOf(t, s.files...)
	p.fault = func(i int, _, n int64) fault {
		if i < packTries-1 {
			return fault{cut: n / 3}
		}
		return fault{}
	}
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		if st, err := w.take(p); err != nil || st.Bad > 0 {
			t.Errorf("%+v, %v", st, err)
		}
		w.wantAll(nil)
		n, _ := p.delivered()
		if w.blob.requests() != 0 || p.requests() != packTries || n > int64(len(p.data))+packTries*70000 {
			t.Errorf("%d requests of the layer, %d of the pack, %d bytes", w.blob.requests(), p.requests(), n)
		}
	})
}

// The same chunk again and again is read once.
func TestPackRepeats(t *testing.T) {
	s := build(t, equal(3, 60000))
	list := []file{s.files[1]}
	for range 500 {
		list = append(list, s.files[0])
	}
	p := s.packOf(t, list...)
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		if st, err := w.take(p); err != nil || st.Bytes > 130000 {
			t.Errorf("%+v, %v", st, err)
		}
		if n, _ := p.delivered(); n > 130000+skip {
			t.Errorf("%d bytes of %d", n, len(p.data))
		}
		w.wantAll(nil)
	})
}

// Of a pack that is mostly here, only the rest is read: what lies between is asked around if it is much, and read over if it is little.
func TestPackPartly(t *testing.T) {
	files := append(equal(8, 60000), file{"large", noise(99, 53*60000)}, file{"last", noise(98, 60000)})
	s := build(t, files)
	p := s.packOf(t, files...)
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		here := s.packOf(t, files[1], files[2], files[8])
		if st, err := w.take(here); err != nil {
			t.Errorf("%+v, %v", st, err)
		}
		st, err := w.take(p)
		if err != nil || st.Here != here.chunks() || st.Bytes != 7*60000 {
			t.Errorf("%+v, %v; %d chunks were here", st, err, here.chunks())
		}
		// Up to f007 in one request, over what is here of it; the last behind the large one in another.
		n, most := p.delivered()
		if p.requests() != 2 || most != 1 || n < 9*60000 || n > 9*60000+10 {
			t.Errorf("%d requests, %d bytes, one of them %d times", p.requests(), n, most)
		}
		w.wantAll(nil)
		if w.blob.requests() != 0 {
			t.Errorf("%d requests of the layer", w.blob.requests())
		}
	})
}

func (p *startup) chunks() (n int) {
	for _, f := range p.x.Frames {
		n += len(f.Chunks)
	}
	return n
}

// A pack puts nothing into the store of a layer that is not lazy: a chunk would pass for the object.
func TestPackWhole(t *testing.T) {
	files := equal(10, 25000)
	layer, err := toc.FromTar(bytes.NewReader(makeTar(t, files)), testChunk, func(toc.Chunk, []byte) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	s := &sample{files: files, toc: layer}
	s.marshal(t)
	p := s.packOf(t, files...)
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		if st, err := w.take(p); st.Bad == 0 || p.requests() > 0 {
			t.Errorf("%+v, %v", st, err)
		}
		for _, f := range files {
			if w.store.Has(s.key(f.name)) {
				t.Errorf("%s is in the store", f.name)
			}
		}
	})
}

// What a pack has of a file is read in sequence without reading ahead of it; beyond, files are read as ever.
func TestPackSequence(t *testing.T) {
	big := file{"big", noise(1, 4<<20)}
	s := build(t, []file{big})
	cut := s.packOf(t, big)
	n := 0
	for at := 0; at < 1<<20; n++ {
		at += cut.x.Frames[n].Inflated
	}
	end := 0
	for _, f := range cut.x.Frames[:n] {
		end += f.Inflated
	}
	cut.x.Frames = cut.x.Frames[:n]
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		if st, err := w.take(cut); err != nil || st.Bytes < 1<<20 {
			t.Fatalf("%+v, %v", st, err)
		}
		at := int64(0)
		for ; at+30000 <= int64(end); at += 30000 {
			w.want(big, at, 30000)
		}
		synctest.Wait()
		if n := w.blob.requests(); n != 0 {
			t.Errorf("%d requests while reading what the pack brought", n)
		}
		for ; at < 4<<20; at += 30000 {
			w.want(big, at, 30000)
		}
		if n := w.blob.requests(); n == 0 || n > 12 {
			t.Errorf("%d requests for the rest", n)
		}
	})
}

// Two packs at once bring everything once; one that stalls does not hold up the other.
func TestPackTwo(t *testing.T) {
	s := build(t, equal(30, 60000))
	for name, stall := range map[string]bool{"both good": false, "one stalls": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := s.enter(t)
				a, b := s.packOf(t, s.files[:20]...), s.packOf(t, s.files[10:]...)
				for _, p := range []*startup{a, b} {
					p.fault = func(int, int64, int64) fault { return fault{pace: time.Millisecond} }
				}
				if stall {
					a.stall = a.frame(3)
				}
				ctx, cancel := context.WithCancel(ctx)
				var all sync.WaitGroup
				all.Go(func() { w.q.Pack(ctx, a.x, a.at, a.open, false, w.layer) })
				if stall {
					time.Sleep(time.Second)
				} else {
					time.Sleep(time.Millisecond)
				}
				if st, err := w.take(b); err != nil || stall && st.Bytes != 20*60000 || !stall && st.Bytes != 10*60000 {
					t.Errorf("%+v, %v", st, err)
				}
				if !stall {
					all.Wait()
				}
				for _, f := range s.files[10:] {
					w.want(f, 0, 60000)
				}
				if n := w.blob.requests(); n != 0 {
					t.Errorf("%d requests of the layer", n)
				}
				cancel()
				all.Wait()
				w.wantAll(nil)
				w.nothingLeft()
			})
		})
	}
}

// Close ends a pack and waits for it; Remove makes its chunks unknown. Reads are right, or fail as the layer's do.
func TestPackEnds(t *testing.T) {
	s := build(t, equal(30, 60000))
	begin := func(t *testing.T) (w *world, result chan error) {
		w, result = s.enter(t), make(chan error, 1)
		p := s.packOf(t, s.files...)
		p.fault = func(int, int64, int64) fault { return fault{pace: time.Millisecond} }
		go func() { _, err := w.take(p); result <- err }()
		time.Sleep(100 * time.Millisecond)
		return w, result
	}
	t.Run("close", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w, result := begin(t)
			read := make(chan error, 1)
			w.blob.fault = func(int, int64, int64) fault { return fault{hang: true} }
			go func() { _, err := w.read(ctx, s.files[9].name, 0, 10); read <- err }()
			synctest.Wait()
			w.q.Close()
			if n := len(w.q.decoders); n > 0 {
				t.Errorf("Close did not wait for the pack: %d frames are being unpacked", n)
			}
			synctest.Wait() // begin's goroutine hands the result over when Pack has returned
			select {
			case err := <-result:
				if !errors.Is(err, errClosed) {
					t.Error(err)
				}
			default:
				t.Error("Close did not end the pack")
				<-result
			}
			if err := <-read; err == nil {
				t.Error("a read of what was on its way does not fail")
			}
			if _, err := w.take(s.packOf(t, s.files...)); !errors.Is(err, errClosed) {
				t.Errorf("a pack after Close: %v", err)
			}
			w.nothingLeft()
		})
	})
	t.Run("remove", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w, result := begin(t)
			w.q.Remove(w.layer)
			if err := <-result; !errors.Is(err, errRemoved) {
				t.Error(err)
			}
			w.nothingLeft()
			w.layer, w.blob = w.add(s, "again")
			w.wantAll(nil)
		})
	})
	t.Run("give up", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := s.enter(t)
			p := s.packOf(t, s.files...)
			p.stall = p.frame(2)
			ctx, cancel := context.WithCancelCause(ctx)
			result := make(chan error, 1)
			go func() { _, err := w.q.Pack(ctx, p.x, p.at, p.open, false, w.layer); result <- err }()
			synctest.Wait()
			why := errors.New("enough")
			cancel(why)
			if err := <-result; !errors.Is(err, why) {
				t.Error(err)
			}
			w.wantAll(nil)
		})
	})
}

// While the store does not grow, who waits for a pack gets his bytes, and the pack is given up.
func TestPackFull(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to mount a small tmpfs")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=4m"); err != nil {
		t.Skipf("cannot mount a tmpfs: %v", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	s := build(t, equal(120, 9000)) // one chunk each, so that no partial file need be there
	synctest.Test(t, func(t *testing.T) {
		w := s.enterIn(t, dir)
		fill, err := os.Create(filepath.Join(dir, "everything"))
		if err != nil {
			t.Fatal(err)
		}
		defer fill.Close()
		if _, err := io.Copy(fill, zeros{}); !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
		p := s.packOf(t, s.files...)
		p.fault = func(int, int64, int64) fault { return fault{pace: time.Millisecond} }
		var all sync.WaitGroup
		all.Go(func() {
			if st, err := w.take(p); !errors.Is(err, errFullStore) || st.Bad > 0 || st.Bytes == int64(len(p.data))-p.at {
				t.Errorf("%+v, %v", st, err)
			}
		})
		time.Sleep(time.Millisecond / 2)
		for _, f := range s.files[:7] { // of the first frame
			all.Go(func() { w.want(f, 10, 5000) })
		}
		all.Wait()
		if n := w.blob.requests(); n != 0 {
			t.Errorf("%d requests for what the pack brought", n)
		}
		w.wantAll(nil)
		if st := w.q.Stats(); st.Errors > 0 {
			t.Errorf("%d reads failed", st.Errors)
		}
		w.nothingLeft()
	})
}

// A pack of another build of the image brings what the two have in common.
func TestPackOtherBuild(t *testing.T) {
	files := equal(40, 20000)
	s := build(t, files)
	changed := slices.Clone(files)
	changed[3].data, changed[20].data = noise(901, 20000), noise(902, 15000)
	other := build(t, append(changed, file{"new", noise(903, 5000)}))
	p := other.packOf(t, other.files...)
	synctest.Test(t, func(t *testing.T) {
		w := s.enter(t)
		stats, err := w.take(p)
		if err != nil || stats.Bad != 0 || stats.Foreign == 0 {
			t.Errorf("%+v, %v", stats, err)
		}
		for i, f := range files {
			if i != 3 && i != 20 {
				w.want(f, 0, len(f.data))
			}
		}
		if n := w.blob.requests(); n != 0 {
			t.Errorf("%d requests for what the builds have in common", n)
		}
		w.want(files[3], 0, 100)
		if n := w.blob.requests(); n != 1 {
			t.Errorf("%d requests for what has changed", n)
		}
		w.nothingLeft()
	})
}

// TestGuessedPack: what a pack lacks is single if somebody saw the start that it is of, and has neighbours if it is a guess.
func TestGuessedPack(t *testing.T) {
	var files []file
	for i := range 40 {
		files = append(files, file{fmt.Sprintf("f%02d", i), noise(uint64(i), 10<<10)})
	}
	s := build(t, files)
	for _, guess := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w := s.enter(t)
			p := s.packOf(t, files[0])
			if _, err := w.q.Pack(t.Context(), p.x, p.at, p.open, guess, w.layer); err != nil {
				t.Fatal(err)
			}
			for i := range 30 {
				w.want(files[39-i], 0, 10) // not forwards, which has windows in any case
				synctest.Wait()
			}
			n := w.blob.requests()
			if single := n > 10; single == guess {
				t.Errorf("a guess %v: %d requests for 30 files", guess, n)
			}
		})
	}
}

// Reads do not follow a pack that comes much slower than what they could ask for; and do follow one that is as slow as the link.
func TestPackSlow(t *testing.T) {
	s := build(t, equal(40, 300000))
	start := func(link, pace time.Duration) (took time.Duration, fetched int64) {
		synctest.Test(t, func(t *testing.T) {
			w := s.enter(t)
			w.blob.fault = func(int, int64, int64) fault { return fault{pace: link} }
			p := s.packOf(t, s.files...)
			p.fault = func(int, int64, int64) fault { return fault{pace: pace} }
			ctx, cancel := context.WithCancel(ctx)
			var all sync.WaitGroup
			if pace > 0 {
				all.Go(func() { w.q.Pack(ctx, p.x, p.at, p.open, false, w.layer) })
				synctest.Wait()
			}
			begun := time.Now()
			w.wantAll(nil)
			took = time.Since(begun)
			fetched, _ = w.blob.delivered()
			cancel()
			all.Wait()
		})
		return took, fetched
	}
	const fast, slow = 40 * time.Microsecond, 2 * time.Millisecond // for 4 KiB: 100 and 2 MB/s
	without, _ := start(fast, 0)
	if with, _ := start(fast, slow); with > without*6/5+maxVain*3*packPatience {
		t.Errorf("%v, without the pack %v", with, without)
	}
	if _, fetched := start(slow, slow); fetched > 3*firstWindow {
		t.Errorf("%d bytes were asked for though the pack comes as fast", fetched)
	}
}

// Beside a pack that has stalled, or brings a byte now and then, misses have neighbours fetched as without a pack.
func TestPackStalls(t *testing.T) {
	s := build(t, equal(80, 100000))
	for name, c := range map[string]struct{ pace, trick time.Duration }{
		"nothing":                      {400 * time.Microsecond, 0}, // 10 MB/s before, for 0.42 s
		"a byte a second":              {400 * time.Microsecond, time.Second},
		"all at once, a byte a second": {time.Microsecond, time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := s.enter(t)
				p := s.packOf(t, s.files...)
				p.fault = func(int, int64, int64) fault { return fault{pace: c.pace} }
				p.stall, p.trick = p.frame(70)+10, c.trick
				ctx, cancel := context.WithCancel(ctx)
				var all sync.WaitGroup
				all.Go(func() { w.q.Pack(ctx, p.x, p.at, p.open, false, w.layer) })
				time.Sleep(420*time.Millisecond + time.Second + 50*time.Millisecond)
				for i := range 40 {
					time.Sleep(10 * time.Millisecond)
					w.want(s.files[40+i*17%40], 0, 10) // not in sequence
				}
				if n := w.blob.requests(); n > 15 {
					t.Errorf("%d requests for 40 files", n)
				}
				cancel()
				all.Wait()
				w.nothingLeft()
			})
		})
	}
}

// A pack is given up when reads want what it has much later, or much that it has not, and do not wait for it.
func TestPackUseless(t *testing.T) {
	s := build(t, equal(80, 60000))
	for name, c := range map[string]struct {
		list   []file // that are read by themselves after a while
		useful bool   // between them, files are read that come next
		given  bool
	}{
		"far":                {list: s.files[60 : 60+maxFar+1], given: true},
		"not so many":        {list: s.files[60 : 60+maxFar]},
		"far, and some soon": {list: s.files[60 : 60+maxFar+1], useful: true},
		"few that it lacks":  {list: s.files[:maxLacking]},
		"much that it lacks": {list: s.files[:maxLacking+1], given: true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := s.enter(t)
				p := s.packOf(t, s.files[30:]...)
				p.fault = func(int, int64, int64) fault { return fault{pace: 5 * time.Millisecond} } // 75 ms each, the last come after 3 s
				w.q.link.rate = 1                                                                    // which is as fast as it gets
				var all sync.WaitGroup
				all.Go(func() {
					st, err := w.take(p)
					if given := errors.Is(err, ErrUseless); given != c.given || given != (st.Bytes < 50*60000) {
						t.Errorf("%+v, %v", st, err)
					}
				})
				time.Sleep(packTrial / 2)
				for i, f := range c.list {
					w.q.wants(w.layer, w.key(f.name), 0) // by itself: a read has neighbours fetched
					if c.useful && i == 0 {
						w.want(s.files[30+7], 0, 10)
					}
				}
				all.Wait()
				w.wantAll(nil)
				w.nothingLeft()
			})
		})
	}
}

// A drawn is a pack without an index of its own: each frame is some bytes over and over.
type drawn struct {
	frames []pack.Frame
	bytes  [][]byte // of the frames
	asked  int
	sent   int64
}

func (d *drawn) add(p []byte, chunks ...pack.Chunk) {
	f := pack.Frame{Chunks: chunks}
	for _, c := range chunks {
		f.Size += c.Size
	}
	f.Inflated = f.Size
	d.frames, d.bytes = append(d.frames, f), append(d.bytes, p)
}

func (d *drawn) open(_ context.Context, off int64) (io.ReadCloser, error) {
	d.asked++
	return io.NopCloser(&drawnReader{d, off}), nil
}

type drawnReader struct {
	*drawn
	off int64
}

func (r *drawnReader) Read(p []byte) (int, error) {
	at := r.off
	for i, f := range r.frames {
		if at < int64(f.Size) {
			b := r.bytes[i]
			n := copy(p[:min(len(p), f.Size-int(at))], b[at%int64(len(b)):])
			r.off += int64(n)
			r.sent += int64(n)
			return n, nil
		}
		at -= int64(f.Size)
	}
	return 0, io.EOF
}

// However a pack repeats, pads and scatters what is wanted, not much more than twice that is fetched.
func TestPackPadded(t *testing.T) {
	const size = 9000 // a chunk each
	s := build(t, equal(150, size))
	chunk := func(i int) pack.Chunk {
		key := s.key(s.files[i].name)
		return pack.Chunk{Object: binary.BigEndian.Uint64(key[:]), Size: size}
	}
	junk := func(n int) pack.Chunk { return pack.Chunk{Object: 12345, Size: n} }
	for name, c := range map[string]struct {
		draw func(d *drawn)
		most int64 // bytes that are read
		err  error
	}{
		"a chunk again and again": {func(d *drawn) {
			for i := range 100 {
				d.add(s.files[i].data, slices.Repeat([]pack.Chunk{chunk(i)}, 100)...)
			}
		}, 0, nil},
		"a new one with old ones": {func(d *drawn) {
			for i := range 100 {
				var list []pack.Chunk
				for j := range i + 1 {
					list = append(list, chunk(i-j))
				}
				d.add(s.files[i].data, list...)
			}
		}, 2*100*size + skip, nil}, // some is read over
		"half of it junk": {func(d *drawn) {
			for i := range 100 {
				d.add(append(slices.Clone(s.files[i].data), make([]byte, size)...), chunk(i), junk(size))
			}
		}, 2 * 100 * size, nil},
		"junk between": {func(d *drawn) {
			for i := range 140 {
				d.add(s.files[i].data, chunk(i))
				d.add(make([]byte, 1), slices.Repeat([]pack.Chunk{chunk(0)}, skip/size)...)
			}
		}, maxSkip + 100*size, errScattered},
		"much junk between": {func(d *drawn) {
			for i := range 140 {
				d.add(s.files[i].data, chunk(i))
				d.add(make([]byte, 1), slices.Repeat([]pack.Chunk{chunk(0)}, 2*skip/size)...)
			}
		}, 100 * size, errScattered},
	} {
		t.Run(name, func(t *testing.T) {
			w := s.enter(t)
			d := &drawn{}
			c.draw(d)
			st, err := w.q.Pack(ctx, &pack.Index{Frames: d.frames}, 0, d.open, false, w.layer)
			if !errors.Is(err, c.err) || d.sent > c.most || d.asked > maxSkip/skip+packTries {
				t.Errorf("%+v, %v; %d bytes in %d requests, want %d at most", st, err, d.sent, d.asked, c.most)
			}
			w.wantAll(nil)
			w.nothingLeft()
		})
	}
}
