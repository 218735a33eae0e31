package rootfs

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"lazuli/fs/elf"
	"lazuli/fs/fetch"
	"lazuli/fs/store"
	"lazuli/fs/toc"
)

// A start that nobody knows goes through an image by names: a program needs libraries, which need others, and a module imports modules. Each
// of them costs a round trip if it is asked for when it is wanted. So what is read is followed: a file that a start opens is looked into as
// soon as it is here, what it names is fetched, and looked into likewise. A chain of n libraries costs about as many round trips as it is
// deep, while the program has not got further than the first.
//
// What files name is in references.go. Nothing depends on it: it may name too much, which costs bytes, or nothing.

const (
	// followPatience is for how long a start is waited for.
	followPatience = time.Minute
	// maxFollowed is how many files one start is followed into.
	maxFollowed = 1 << 12
	// maxBrought is how many bytes of blobs are fetched for that: what is kept compressed.
	maxBrought = 256 << 20
	// maxTrees is how many files the trees of all starts that are followed may have: about 20 MB.
	maxTrees = 1 << 17
	// followers is how many files are looked into side by side. Most of the time they are waited for.
	followers = 16
	// maxDepth is how many steps away from what is read a file is looked into that is named by guess; when it is read itself, it counts anew. Of
	// a job with NumPy and SciPy, and of one with ROS, files that were fetched, those that were not read, and reads that waited (of a model):
	//
	//	maxDepth       2             4             6             -
	//	             937 291 82   1112 466 42   1282 636 43   1454 808 32
	//	            1176 372 81   1376 572 70   1604 800 68   2468 1664 65
	maxDepth = 4
	// gather is for how long more is waited for when there is something to fetch, so that it takes fewer requests: much less than a round
	// trip of a link where any of this is of use.
	gather = 3 * time.Millisecond
	// glancePatience is for how long one is waited for.
	glancePatience = 10 * time.Second
)

// A following is what a node has to do with starts that are followed.
type following struct {
	ctx    context.Context // ends at close
	cancel context.CancelFunc
	work   sync.WaitGroup
	files  atomic.Int64 // of all trees
}

func newFollowing() *following {
	f := new(following)
	f.ctx, f.cancel = context.WithCancel(context.Background())
	return f
}

func (f *following) close() {
	f.cancel()
	f.work.Wait()
}

// covered waits for the startup pack's index and reports whether there is one that may have what a start wants.
func (s *Startup) covered() bool {
	select {
	case <-s.ready:
	case <-s.ctx.Done():
	}
	select {
	case <-s.ready:
		return s.err == nil && s.index != nil
	default:
		return true // it is over
	}
}

// follow begins to follow the start until it is over: of layers, whose tables of contents are tocs.
func (s *Startup) follow(layers []*fetch.Layer, tocs []*toc.TOC) {
	all := s.n.following
	ctx, work := s.ctx, &s.work
	if s.pulled {
		ctx, work = all.ctx, &all.work
	}
	size := int64(0)
	for _, t := range tocs {
		for i := range t.Entries {
			if followable(&t.Entries[i]) {
				size++
			}
		}
	}
	if size == 0 || len(layers) == 0 || ctx.Err() != nil {
		return
	}
	if all.files.Add(size) > maxTrees {
		all.files.Add(-size)
		return
	}
	recorder := s.n.queue.Record(layers...)
	work.Go(func() {
		defer all.files.Add(-size)
		defer recorder.Stop()
		f := &follower{n: s.n, layers: layers, tree: newTree(tocs), recorder: recorder, wake: make(chan struct{}, 1), open: make(chan step, 2*maxFollowed)}
		tocs = nil // large
		f.steps = make([]uint8, len(f.tree.files))
		f.follow(ctx)
		s.n.log.Debug("followed a start", "image", s.ref.String(), "files", f.followed, "requests", f.runs.Load(), "bytes", f.bytes.Load(), "lookups", f.lookups.Load())
	})
}

// A step is a file, and how many names lead to it from one that is read. Names of libraries do not count, they are no guess.
type step struct {
	file  int32
	depth uint8
	read  bool // nobody names it: it is read
}

// A follower follows one start.
type follower struct {
	n        *Node
	layers   []*fetch.Layer
	tree     *tree
	recorder *fetch.Recorder
	open     chan step     // files to look into
	wake     chan struct{} // has a token when something was found

	// Of one goroutine:
	steps    []uint8 // by file: how far it is from what is read, and one more; 0 is one that was not brought
	followed int

	runs, bytes atomic.Int64 // requests, and bytes of blobs that they asked for

	mu    sync.Mutex
	found []step // files that others name

	references
}

// follow follows the start until it is over, or ctx ends.
func (f *follower) follow(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	over := make(chan struct{})
	defer time.AfterFunc(followPatience, func() {
		select {
		case <-f.recorder.Begun():
		default:
			close(over)
		}
	}).Stop()
	var work sync.WaitGroup
	defer work.Wait()
	work.Go(func() {
		(&start{recorder: f.recorder, over: over}).wait(ctx)
		cancel()
	})
	for range followers {
		work.Go(func() {
			for {
				select {
				case x := <-f.open:
					f.look(ctx, x)
				case <-ctx.Done():
					return
				}
			}
		})
	}
	for read := 0; f.followed < maxFollowed && f.bytes.Load() < maxBrought; {
		select {
		case <-f.recorder.More():
		case <-f.wake:
		case <-ctx.Done():
			return
		}
		select {
		case <-time.After(gather):
		case <-ctx.Done():
			return
		}
		if err := f.n.queue.WaitSlot(ctx); err != nil {
			return
		}
		touches := f.recorder.From(read)
		read += len(touches)
		f.mu.Lock()
		steps := f.found
		f.found = nil
		f.mu.Unlock()
		for _, t := range touches {
			if file, ok := f.tree.objects[packNumber(toc.Digest(t.Key))]; ok {
				steps = append(steps, step{file: file, read: true})
			}
		}
		f.bring(steps)
	}
	cancel()
}

// bring has files fetched, and looked into when they are here.
func (f *follower) bring(steps []step) {
	var wants []fetch.Want
	var look []step
	for _, x := range steps {
		was := f.steps[x.file]
		if was > 0 && (was <= maxDepth || x.depth >= maxDepth) || f.followed == maxFollowed {
			continue // it was looked into, or will not be now either
		}
		o, ok := f.object(x.file)
		if !ok {
			continue
		}
		f.steps[x.file] = x.depth + 1
		if was == 0 {
			f.followed++
		}
		if was == 0 && !x.read {
			wants = append(wants, part(o, 0, headOf(o.Size))...)
		}
		if x.depth < maxDepth {
			look = append(look, x)
		}
	}
	f.fetch(wants)
	for _, x := range look {
		f.open <- x // it has room for all that are followed
	}
}

func (f *follower) fetch(wants []fetch.Want) {
	stats := f.n.queue.Bring(wants, f.layers...)
	f.runs.Add(int64(stats.Runs))
	f.bytes.Add(stats.Bytes)
}

// object returns a file's content as the layers have it.
func (f *follower) object(file int32) (toc.Object, bool) {
	for _, l := range f.layers {
		if o, ok := l.Table.FindPrefix(f.tree.files[file].object, 64); ok {
			return o, true
		}
	}
	return toc.Object{}, false
}

const (
	// maxWholeFile is how many bytes a file may have that is fetched whole: python3.11 has 6.8 MB, of which a start reads two thirds, and a
	// job with OpenCV waited 30 times less than with 4 MiB.
	maxWholeFile = 8 << 20
	// headSize is how much of the beginning of larger ones is fetched before they are looked into.
	headSize = 1 << 20
	// maxParts is how much of a larger one is fetched in all.
	maxParts = 32 << 20
)

// headOf returns how many bytes of a file are fetched when it is named.
func headOf(size int64) int64 {
	if size <= maxWholeFile {
		return size
	}
	return headSize
}

// part returns the chunks of an object that have some of its bytes from off to end.
func part(o toc.Object, off, end int64) (list []fetch.Want) {
	if off < 0 || off >= end || end > o.Size {
		return nil
	}
	for i := o.ChunkAt(off); i <= o.ChunkAt(end-1); i++ {
		list = append(list, fetch.Want{Key: store.Key(o.Key), Chunk: i})
	}
	return list
}

// look finds what a file names.
func (f *follower) look(ctx context.Context, x step) {
	o, ok := f.object(x.file)
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, glancePatience)
	defer cancel()
	read := func(off, n int64) []byte {
		p := make([]byte, n)
		if err := f.n.queue.Glance(ctx, store.Key(o.Key), p, off, f.layers...); err != nil {
			return nil
		}
		return p
	}
	var named []int32
	depth := x.depth
	if isPython(f.tree.files[x.file].name) {
		depth++
		named = f.python(f.tree, x.file, o.Size, read)
	} else {
		if x.read { // it is executable, but not necessarily a program
			if string(read(0, min(o.Size, int64(len(elf.Magic))))) != elf.Magic {
				return
			}
			f.fetch(part(o, 0, headOf(o.Size)))
		}
		var parts []elf.Part
		if named, parts = f.elf(f.tree, x.file, o.Size, read); o.Size > maxWholeFile {
			var wants []fetch.Want
			left := int64(maxParts)
			for _, p := range parts {
				n := min(p.Size, left)
				left -= n
				wants = append(wants, part(o, p.Off, p.Off+n)...)
			}
			f.fetch(wants)
		}
	}
	if len(named) == 0 {
		return
	}
	f.mu.Lock()
	for _, file := range named {
		f.found = append(f.found, step{file: file, depth: depth})
	}
	f.mu.Unlock()
	select {
	case f.wake <- struct{}{}:
	default:
	}
}
