package upper

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"lazuli/fs/store"
	"lazuli/fs/toc"
)

// newUpper is a world whose upper directory the test writes by itself, what no mount makes too.
func newUpper(t testing.TB) *world {
	t.Helper()
	w := newWorld(t)
	w.add(t, base())
	w.mountMeta(t)
	return w
}

func (w *world) set(t testing.TB, name, xattr, value string) {
	t.Helper()
	must(t, unix.Lsetxattr(filepath.Join(w.upper, name), xattr, []byte(value), 0))
}

func (w *world) write(t testing.TB, name, content string) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(filepath.Join(w.upper, name)), 0o755))
	must(t, os.WriteFile(filepath.Join(w.upper, name), []byte(content), 0o644))
}

// hollow makes a file with a size and no data, as a metadata copy-up does.
func (w *world) hollow(t testing.TB, name string, size int64, redirect string) {
	t.Helper()
	w.write(t, name, "")
	must(t, os.Truncate(filepath.Join(w.upper, name), size))
	w.set(t, name, metacopyName, "")
	if redirect != "" {
		w.set(t, name, redirectName, redirect)
	}
}

// find returns the entry of that name.
func find(l *toc.TOC, name string) *toc.Entry {
	for i := range l.Entries {
		if l.Entries[i].Name == name {
			return &l.Entries[i]
		}
	}
	return nil
}

func keyOf(l *toc.TOC, name string) toc.Digest { return toc.ObjectKey(l.Content(find(l, name))) }

// names returns the names of all entries below dir.
func names(l *toc.TOC, dir string) string {
	var all []string
	for _, e := range l.Entries {
		if rest, ok := strings.CutPrefix(e.Name, dir+"/"); ok {
			all = append(all, rest)
		}
	}
	return strings.Join(all, " ")
}

// TestForms: upper directories as other kernels and unpackers write them.
func TestForms(t *testing.T) {
	w := newUpper(t)
	lower := w.layers[0]
	// A redirect into the store, as the metadata image has it.
	w.hollow(t, "byKey", 3*chunk+1, "/"+store.Key(keyOf(lower, "d/large")).Path())
	w.hollow(t, "byPath", 3*chunk+1, "/d/large")
	w.hollow(t, "d/byName", 3*chunk+1, "large")
	w.hollow(t, "d/one", 1, "")
	w.hollow(t, "d/empty", 0, "")
	// Whiteouts without devices, as in a mount in a user namespace.
	w.set(t, "d", opaqueName, "x")
	w.write(t, "d/chunk", "")
	w.set(t, "d/chunk", whiteoutName, "")
	must(t, unix.Mknod(filepath.Join(w.upper, "top"), unix.S_IFCHR, 0))
	// Opaque wins over a redirect; there are no whiteouts in it, also not further below.
	w.write(t, "opaque/dir/f", "f")
	w.set(t, "opaque", opaqueName, "y")
	w.set(t, "opaque", redirectName, "/d")
	must(t, unix.Mknod(filepath.Join(w.upper, "opaque/dir/w"), unix.S_IFCHR, 0))
	// A redirect to what is not a directory, and to one behind a symlink, shows nothing.
	for dir, to := range map[string]string{"tofile": "/top", "tonothing": "/nothing/there", "tolink": "/d/todir", "behindlink": "/d/todir/deep"} {
		must(t, os.Mkdir(filepath.Join(w.upper, dir), 0o755))
		w.set(t, dir, redirectName, to)
	}
	// Sideways, from within what is opaque.
	must(t, os.Mkdir(filepath.Join(w.upper, "opaque/sub"), 0o755))
	w.set(t, "opaque/sub", redirectName, "/d/sub")
	// What cannot be in a layer.
	w.write(t, ".wh..wh..opq", "")
	w.write(t, "e/.wh.x", "")
	w.write(t, "e/.wh.dir/f", "")
	w.write(t, toc.TarName, "{}")
	w.write(t, "e/"+toc.TarName, "{}")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	must(t, err)
	defer unix.Close(fd)
	must(t, unix.Bind(fd, &unix.SockaddrUnix{Name: filepath.Join(w.upper, "s")}))

	l, err := w.scan(true).TOC(t.Context())
	must(t, err)
	for _, name := range []string{"byKey", "byPath", "d/byName"} {
		if keyOf(l, name) != keyOf(lower, "d/large") {
			t.Errorf("%s has another object than d/large", name)
		}
	}
	if keyOf(l, "d/one") != keyOf(lower, "d/one") {
		t.Error("d/one has another object")
	}
	for dir, want := range map[string]string{
		"d":          "byName .wh.chunk empty one",
		"opaque":     ".wh..wh..opq dir dir/f sub sub/a sub/b sub/deep sub/deep/c sub/deep/d",
		"tofile":     ".wh..wh..opq",
		"tonothing":  ".wh..wh..opq",
		"tolink":     ".wh..wh..opq",
		"behindlink": ".wh..wh..opq",
		"e":          toc.TarName,
	} {
		if got := names(l, dir); got != want {
			t.Errorf("%s has %q, want %q", dir, got, want)
		}
	}
	for name, there := range map[string]bool{".wh.top": true, "top": false, ".wh..wh..opq": false, "s": false, toc.TarName: false} {
		if (find(l, name) != nil) != there {
			t.Errorf("%q is in the layer: %v", name, !there)
		}
	}
	mustLog(t, w, "level=WARN", ".wh.", "count=3")
}

// TestErrors: an upper directory that does not belong to its lower layers, or is more than a layer holds.
func TestErrors(t *testing.T) {
	for _, test := range []struct {
		name string
		make func(t *testing.T, w *world, s *Scan)
		want string
	}{
		{"redirect up", func(t *testing.T, w *world, _ *Scan) { w.hollow(t, "f", 1, "/d/../d/one") }, `"f": trusted.overlay.redirect is "/d/../d/one"`},
		{"redirect to ..", func(t *testing.T, w *world, _ *Scan) { w.hollow(t, "d/f", 1, "..") }, `"d/f": trusted.overlay.redirect is ".."`},
		{"redirect of two names", func(t *testing.T, w *world, _ *Scan) { w.hollow(t, "d/f", 1, "sub/a") }, `trusted.overlay.redirect is "sub/a"`},
		{"directory redirected up", func(t *testing.T, w *world, _ *Scan) {
			w.write(t, "dir/f", "")
			w.set(t, "dir", redirectName, "/../../../etc")
		}, `"dir": trusted.overlay.redirect`},
		{"metadata of nothing", func(t *testing.T, w *world, _ *Scan) { w.hollow(t, "d/none", 1, "") }, `"d/none": its data is in a lower layer, but`},
		{"metadata of another size", func(t *testing.T, w *world, _ *Scan) { w.hollow(t, "d/large", 2, "") }, `which is not a file of 2 bytes`},
		{"metadata of a directory", func(t *testing.T, w *world, _ *Scan) { w.hollow(t, "d/sub", 4096, "") }, `which is not a file of 4096 bytes`},
		{"metadata of a symlink", func(t *testing.T, w *world, _ *Scan) { w.hollow(t, "d/symlink", 6, "") }, `which is not a file of 6 bytes`},
		{"metadata without lower layers", func(t *testing.T, w *world, s *Scan) {
			w.hollow(t, "d/one", 1, "")
			s.Lower = ""
		}, `its data is in a lower layer`},
		{"unknown object", func(t *testing.T, w *world, s *Scan) {
			w.hollow(t, "d/one", 1, "")
			s.Chunks = nil
		}, `which no lower layer has`},
		{"object of another size", func(t *testing.T, w *world, _ *Scan) {
			w.hollow(t, "f", 5, "/"+store.Key(keyOf(w.layers[0], "d/large")).Path())
		}, `of 5 bytes, but the lower layers' chunks are another of 393217`},
		{"wrong chunks", func(t *testing.T, w *world, s *Scan) {
			w.hollow(t, "d/one", 1, "")
			s.Chunks = func(toc.Digest) ([]toc.Chunk, bool) { return []toc.Chunk{{Size: 1, Hole: true}}, true }
		}, `but the lower layers' chunks are another of 1`},
		{"wrong chunks below what was renamed", func(t *testing.T, w *world, s *Scan) {
			must(t, os.Mkdir(filepath.Join(w.upper, "dir"), 0o755))
			w.set(t, "dir", redirectName, "/e")
			s.Chunks = func(toc.Digest) ([]toc.Chunk, bool) { return []toc.Chunk{{FileOffset: 1, Size: 1}}, true }
		}, `"dir/x": its data is object`},
		{"too many chunks", func(t *testing.T, w *world, _ *Scan) {
			w.write(t, "f", "")
			must(t, os.Truncate(filepath.Join(w.upper, "f"), toc.MaxChunks*chunk+1))
		}, `"f": more than 4194304 chunks`},
		{"too many xattrs", func(t *testing.T, w *world, _ *Scan) {
			w.upper = filepath.Join(memory(t), "upper") // no file system on a disk takes as much
			w.write(t, "f", "")
			w.set(t, "f", "trusted.a", string(make([]byte, 40000)))
			w.set(t, "f", "trusted.b", string(make([]byte, 40000)))
		}, `entry "f": xattr "trusted.b": more than 65536 bytes`},
		{"too deep", func(t *testing.T, w *world, _ *Scan) {
			dir, err := unix.Open(w.upper, unix.O_PATH, 0)
			must(t, err)
			for range 2100 {
				must(t, unix.Mkdirat(dir, "d", 0o755))
				next, err := unix.Openat(dir, "d", unix.O_PATH, 0)
				must(t, err)
				unix.Close(dir)
				dir = next
			}
			unix.Close(dir)
		}, `at most 4095 are possible`},
		{"another mount", func(t *testing.T, w *world, _ *Scan) {
			dir := filepath.Join(w.upper, "proc")
			must(t, os.Mkdir(dir, 0o755))
			must(t, unix.Mount("none", dir, "proc", 0, ""))
			t.Cleanup(unmounter(t, dir))
		}, `"proc": invalid cross-device link`},
		{"no upper directory", func(t *testing.T, w *world, s *Scan) { w.upper += "/none" }, "no such file or directory"},
		{"no metadata image", func(t *testing.T, w *world, s *Scan) { s.Lower += "/none" }, "metadata image"},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newUpper(t)
			s := w.scan(true)
			test.make(t, w, s)
			s.Upper = w.upper
			l, err := s.TOC(t.Context())
			if err == nil || l != nil || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), w.upper) {
				t.Errorf("error %v, want one with %q and the upper directory", err, test.want)
			}
		})
	}
}

// TestSymlinks: what a container plants leads nowhere.
func TestSymlinks(t *testing.T) {
	w := newUpper(t)
	secret := t.TempDir()
	must(t, os.WriteFile(filepath.Join(secret, "secret"), []byte("secret"), 0o600))
	must(t, os.Symlink(secret, filepath.Join(w.upper, "dir")))
	must(t, os.Symlink(filepath.Join(secret, "secret"), filepath.Join(w.upper, "file")))
	must(t, os.Symlink("file", filepath.Join(w.upper, "again")))
	must(t, unix.Mkfifo(filepath.Join(w.upper, "fifo"), 0o600)) // opening it would wait for ever
	before := w.objects(t)
	l, err := w.scan(true).TOC(t.Context())
	must(t, err)
	for _, name := range []string{"dir", "file", "again"} {
		if e := find(l, name); e == nil || e.Type != toc.Symlink {
			t.Errorf("%q is %v, want a symlink", name, e)
		}
	}
	if len(l.Entries) != 5 || len(l.Chunks) != 0 || len(w.objects(t)) != len(before) {
		t.Errorf("%d entries, %d chunks: want the root and what was planted", len(l.Entries), len(l.Chunks))
	}
}

// TestMoved: an upper directory is moved from once.
func TestMoved(t *testing.T) {
	w := newUpper(t)
	w.write(t, "f", "content")
	_, err := w.scan(false).TOC(t.Context())
	must(t, err)
	w.write(t, "g", "content") // moved from, but nothing is moved: the store has it
	_, err = w.scan(true).TOC(t.Context())
	must(t, err)
	if _, err := os.Stat(filepath.Join(w.upper, "g")); err != nil {
		t.Errorf("a file that the store had was moved: %v", err)
	}
	w.write(t, "h", "other content")
	first, err := w.scan(true).TOC(t.Context())
	must(t, err)
	if _, err := os.Lstat(filepath.Join(w.upper, "h")); !os.IsNotExist(err) {
		t.Errorf("a file is still there after it was moved: %v", err)
	}
	if find(first, "h") == nil {
		t.Error("the layer does not have the file that was moved")
	}
	for _, move := range []bool{true, false} {
		if l, err := w.scan(move).TOC(t.Context()); err == nil || !strings.Contains(err.Error(), "make the snapshot again") {
			t.Errorf("Move %v: a second scan returned %v, %v", move, l, err)
		}
	}
}

// TestOpenFile: a file that somebody has open for writing is copied, and what is written later is not in the object.
func TestOpenFile(t *testing.T) {
	w := newUpper(t)
	w.write(t, "f", text("f", 2*chunk))
	w.write(t, "two", "two names")
	must(t, os.Link(filepath.Join(w.upper, "two"), filepath.Join(w.upper, "three")))
	f, err := os.OpenFile(filepath.Join(w.upper, "f"), os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	before := w.objects(t)
	l, err := w.scan(true).TOC(t.Context())
	must(t, err)
	_, err = f.WriteAt([]byte("written later"), 0)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(w.upper, "three"), []byte("written"), 0o644))
	w.check(t, l, before)
	if len(w.objects(t))-len(before) != 2 {
		t.Errorf("%d new objects, want 2", len(w.objects(t))-len(before))
	}
	mustLog(t, w, "level=DEBUG", "write lease", "file=f")
}

// TestOtherFileSystem: nothing can be renamed from there, so everything is copied.
func TestOtherFileSystem(t *testing.T) {
	w := newUpper(t)
	w.upper = filepath.Join(memory(t), "upper")
	w.write(t, "f", "content")
	before := w.objects(t)
	l, err := w.scan(true).TOC(t.Context())
	must(t, err)
	w.check(t, l, before)
	if _, err := os.Stat(filepath.Join(w.upper, "f")); err != nil {
		t.Error(err)
	}
}

// A hookContext calls do when it is asked for the n-th time whether it is done.
type hookContext struct {
	context.Context
	n  int
	do func()
}

func (c *hookContext) Err() error {
	if c.n--; c.n == 0 {
		c.do()
	}
	return c.Context.Err()
}

// workOn has a worker read a file with ctx, whose Err is asked for once per chunk.
func workOn(t *testing.T, w *world, name string, ctx context.Context, moving bool) (content, error) {
	t.Helper()
	dir, err := openRoot(w.upper)
	must(t, err)
	t.Cleanup(func() { unix.Close(dir) })
	x := &walk{Scan: w.scan(moving), log: slog.New(slog.NewTextHandler(&w.log, &slog.HandlerOptions{Level: slog.LevelDebug})), lower: -1, workers: &errgroup.Group{}, move: moving, mark: onceMark(dir)}
	n, err := x.look(dir, name)
	must(t, err)
	parent := &node{fd: dir}
	c := &content{}
	must(t, x.work(ctx, parent, name, name, n, c))
	return *c, x.workers.Wait()
}

// TestChangedWhileRead: whatever happens to a file between two of its chunks, the object is what its key says.
func TestChangedWhileRead(t *testing.T) {
	const size = 4 * chunk
	for _, test := range []struct {
		name string
		do   func(t *testing.T, path string)
		size int64 // of the object
		log  string
	}{
		{"opened", func(t *testing.T, path string) {
			// Nobody gets at the file while there is a lease on it; who asks without waiting is told so.
			if fd, err := unix.Open(path, unix.O_WRONLY|unix.O_NONBLOCK, 0); err != unix.EWOULDBLOCK {
				unix.Close(fd)
				t.Errorf("open for writing: %v, want EWOULDBLOCK", err)
			}
		}, size, "opened it meanwhile"},
		{"replaced", func(t *testing.T, path string) {
			must(t, os.WriteFile(path+"2", []byte("other"), 0o644))
			must(t, os.Rename(path+"2", path))
		}, size, "not a regular file with one name"},
		{"removed", func(t *testing.T, path string) { must(t, os.Remove(path)) }, size, "not a regular file with one name"},
		{"linked", func(t *testing.T, path string) { must(t, os.Link(path, path+"2")) }, size, "not a regular file with one name"},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newUpper(t)
			w.write(t, "f", text("f", size))
			ctx := &hookContext{context.Background(), 3, func() { test.do(t, filepath.Join(w.upper, "f")) }}
			c, err := workOn(t, w, "f", ctx, true)
			must(t, err)
			w.checkContent(t, c, test.size)
			mustLog(t, w, "copied", test.log)
		})
	}
	for _, test := range []struct {
		name string
		do   func(t *testing.T, path string)
		size int64
	}{
		{"written behind", func(t *testing.T, path string) { overwrite(t, path, 0) }, size},
		{"written before", func(t *testing.T, path string) { overwrite(t, path, 3*chunk) }, size},
		{"appended", func(t *testing.T, path string) { overwrite(t, path, size) }, size},
		{"truncated", func(t *testing.T, path string) { must(t, os.Truncate(path, 2*chunk+5)) }, 2*chunk + 5},
		{"truncated to nothing", func(t *testing.T, path string) { must(t, os.Truncate(path, 0)) }, 2 * chunk},
	} {
		t.Run("copied and "+test.name, func(t *testing.T) {
			w := newUpper(t)
			w.write(t, "f", text("f", size))
			ctx := &hookContext{context.Background(), 3, func() { test.do(t, filepath.Join(w.upper, "f")) }}
			c, err := workOn(t, w, "f", ctx, false)
			must(t, err)
			w.checkContent(t, c, test.size)
		})
	}
}

func overwrite(t *testing.T, path string, off int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt([]byte("overwritten"), off)
	must(t, errors.Join(err, f.Close()))
}

func (w *world) checkContent(t *testing.T, c content, size int64) {
	t.Helper()
	if c.size != size {
		t.Errorf("%d bytes, want %d", c.size, size)
	}
	w.check(t, &toc.TOC{
		Entries: []toc.Entry{{Name: "f", Size: c.size, NumChunks: uint32(len(c.chunks))}},
		Chunks:  c.chunks,
	}, nil)
}

// TestCancel: a scan ends between two chunks.
func TestCancel(t *testing.T) {
	w := newUpper(t)
	w.write(t, "f", text("f", 4*chunk))
	before := w.objects(t)
	inner, cancel := context.WithCancelCause(context.Background())
	why := errors.New("the reason")
	ctx := &hookContext{inner, 3, func() { cancel(why) }}
	if _, err := workOn(t, w, "f", ctx, true); !errors.Is(err, why) {
		t.Errorf("error %v, want %v", err, why)
	}
	if _, err := w.scan(true).TOC(inner); !errors.Is(err, why) {
		t.Errorf("error %v, want %v", err, why)
	}
	if len(w.objects(t)) != len(before) {
		t.Error("an object of a scan that was cancelled is in the store")
	}
}

// TestSameAsTar: a file has the same object whether it comes from a tar or from an upper directory, holes or not.
func TestSameAsTar(t *testing.T) {
	w := newUpper(t)
	zeros := string(make([]byte, 2*chunk+5)) + "end" + string(make([]byte, chunk))
	w.add(t, []entry{regular("sparse", zeros), regular("f", text("f", chunk+1))})
	w.write(t, "f", text("f", chunk+1))
	w.write(t, "sparse", "")
	must(t, os.Truncate(filepath.Join(w.upper, "sparse"), int64(len(zeros))))
	f, err := os.OpenFile(filepath.Join(w.upper, "sparse"), os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt([]byte("end"), 2*chunk+5)
	must(t, errors.Join(err, f.Close()))
	l, err := w.scan(false).TOC(t.Context())
	must(t, err)
	for _, name := range []string{"f", "sparse"} {
		if keyOf(l, name) != keyOf(w.layers[1], name) {
			t.Errorf("%s is another object than from a tar", name)
		}
	}
}

// TestDigest: everything that a layer says is in its digest, and nothing else.
func TestDigest(t *testing.T) {
	w := newUpper(t)
	w.write(t, "f", "content")
	w.write(t, "g", "content")
	last := toc.Digest{}
	for _, change := range []string{
		":", "chmod 600 f", "chown 5 f", "chgrp 5 f", "touch -d 2001-01-01 f", "touch -d '2001-01-01 00:00:00.5' f", "ln -sf f s", "ln -sfT g s", "ln -f f h", "ln -f g h",
		"mv g i", "echo more >> f", "mkdir d", "mkfifo p", "rm p; mknod p c 1 3", "rm p; mknod p c 1 4", "rm p; mknod p b 1 4",
	} {
		// The directory's time is no part of this.
		run(t, "cd "+w.upper+"; "+change+"; touch -d 2020-01-01 .")
		for i := range 2 {
			l, err := w.scan(false).TOC(t.Context())
			must(t, err)
			if (l.Digest == last) != (i == 1) {
				t.Errorf("%s: digest %v, before %v", change, l.Digest, last)
			}
			last = l.Digest
		}
	}
	w.set(t, "f", "user.x", "1")
	l, err := w.scan(false).TOC(t.Context())
	must(t, err)
	if l.Digest == last {
		t.Error("an xattr is not in the digest")
	}
}

// TestMany has more files than workers, and names that share inodes among them.
func TestMany(t *testing.T) {
	w := newUpper(t)
	for i := range 1000 {
		w.write(t, "dir"+string(rune('a'+i%7))+"/"+string(rune('a'+i%26))+string(rune('a'+i/26%26))+string(rune('a'+i/676)), text("q", i))
	}
	before := w.objects(t)
	l, err := w.scan(true).TOC(t.Context())
	must(t, err)
	must(t, checkOrder(l))
	w.check(t, l, before)
	if n := len(w.objects(t)) - len(before); n != 999 {
		t.Errorf("%d objects, want 999: one file is empty", n)
	}
	left := 0
	must(t, filepath.WalkDir(w.upper, func(_ string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			left++
		}
		return err
	}))
	if left != 1 {
		t.Errorf("%d files were left in the upper directory, want the empty one", left)
	}
	fds, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	if len(fds) > 100 {
		t.Errorf("%d descriptors are open", len(fds))
	}
}
