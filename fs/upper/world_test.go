package upper

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"lazuli/fs/meta"
	"lazuli/fs/store"
	"lazuli/fs/toc"
	"lazuli/integration"
)

// skip skips the test, unless LAZULI_CI is set: there the machine has everything.
func skip(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("LAZULI_CI") != "" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		skip(t, "needs root: overlayfs keeps what it does in trusted xattrs")
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		skip(t, "needs loop devices: %v", err)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A world is a node: a store, and the layers of one image, of which the highest is being written.
type world struct {
	dir    string
	store  *store.Store
	layers []*toc.TOC
	log    bytes.Buffer

	meta, mnt, upper string
	unmount          func()
}

func newWorld(t testing.TB) *world { return newWorldIn(t, t.TempDir()) }

func newWorldIn(t testing.TB, dir string) *world {
	t.Helper()
	needRoot(t)
	w := &world{dir: dir}
	s, err := store.Open(filepath.Join(w.dir, "store"), nil)
	must(t, err)
	t.Cleanup(func() { s.Close() })
	w.store = s
	return w
}

// add makes a layer of a tar, as rootfs does with one that is not lazy.
func (w *world) add(t testing.TB, entries []entry) {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.Header
		h.Format, h.Size = tar.FormatPAX, int64(len(e.content))
		must(t, tw.WriteHeader(&h))
		_, err := tw.Write([]byte(e.content))
		must(t, err)
	}
	must(t, tw.Close())
	var object bytes.Buffer
	contents := map[toc.Digest][]byte{}
	l, err := toc.FromTar(&b, toc.DefaultChunkSize, func(c toc.Chunk, p []byte) error {
		contents[c.Digest] = bytes.Clone(p)
		return nil
	})
	must(t, err)
	for i := range l.Entries {
		chunks := l.Content(&l.Entries[i])
		if len(chunks) == 0 {
			continue
		}
		object.Reset()
		for _, c := range chunks {
			object.Write(contents[c.Digest])
		}
		must(t, w.store.Put(store.Key(toc.ObjectKey(chunks)), object.Bytes()))
	}
	w.layers = append(w.layers, l)
}

// mountMeta mounts the metadata image of all layers, and makes an empty upper directory. It returns what unmounts it.
func (w *world) mountMeta(t testing.TB) func() {
	t.Helper()
	dir, err := os.MkdirTemp(w.dir, "mount")
	must(t, err)
	w.meta, w.mnt, w.upper = filepath.Join(dir, "meta"), filepath.Join(dir, "mnt"), filepath.Join(dir, "upper")
	for _, d := range []string{w.meta, w.mnt, w.upper, w.upper + ".work"} {
		must(t, os.Mkdir(d, 0o755))
	}
	image, err := os.Create(filepath.Join(dir, "meta.erofs"))
	must(t, err)
	_, err = meta.Build(image, w.layers)
	must(t, errors.Join(err, image.Close()))
	run(t, "mount -t erofs -o loop,ro "+image.Name()+" "+w.meta)
	return unmounter(t, w.meta)
}

// mount mounts the image of all layers; rw with the upper directory.
func (w *world) mount(t testing.TB, rw bool) {
	t.Helper()
	unmountMeta := w.mountMeta(t)
	options := "metacopy=on,lowerdir=" + w.meta + "::" + w.store.Objects()
	flags := uintptr(unix.MS_RDONLY)
	if rw {
		var st unix.Stat_t // as rootfs does
		must(t, unix.Stat(w.meta, &st))
		must(t, os.Chown(w.upper, int(st.Uid), int(st.Gid)))
		must(t, unix.Chmod(w.upper, st.Mode&0o7777))
		must(t, unix.UtimesNanoAt(unix.AT_FDCWD, w.upper, []unix.Timespec{st.Mtim, st.Mtim}, 0))
		options += ",redirect_dir=on,volatile,upperdir=" + w.upper + ",workdir=" + w.upper + ".work"
		flags = 0
	} else {
		options += ",redirect_dir=follow"
	}
	must(t, unix.Mount("overlay", w.mnt, "overlay", flags, options))
	unmountOverlay := unmounter(t, w.mnt)
	w.unmount = func() {
		unmountOverlay()
		unmountMeta()
	}
}

// unmounter returns what unmounts dir, at the end of the test at the latest.
func unmounter(t testing.TB, dir string) func() {
	mounted := true
	f := func() {
		if mounted {
			mounted = false
			err := unix.Unmount(dir, 0)
			// A process that another test is just starting has what this one has open, until it executes its program.
			for n := 0; errors.Is(err, unix.EBUSY) && n < 100; n++ {
				time.Sleep(10 * time.Millisecond)
				err = unix.Unmount(dir, 0)
			}
			if err != nil {
				t.Error(dir, err)
			}
		}
	}
	t.Cleanup(f)
	return f
}

func run(t testing.TB, script string) {
	t.Helper()
	c := exec.Command("sh", "-euc", script)
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
}

func snapshot(t testing.TB, dir string) integration.Tree {
	t.Helper()
	tree, err := integration.Snapshot(dir)
	must(t, err)
	return tree
}

// chunks finds an object in the layers, as the snapshotter does in their tables.
func (w *world) chunks(key toc.Digest) ([]toc.Chunk, bool) {
	for _, l := range w.layers {
		for i := range l.Entries {
			if c := l.Content(&l.Entries[i]); len(c) > 0 && toc.ObjectKey(c) == key {
				c = append([]toc.Chunk(nil), c...)
				for i := range c {
					c[i].Member, c[i].Inner = 1<<40, 1 // as in a lazy layer
				}
				return c, true
			}
		}
	}
	return nil, false
}

func (w *world) scan(move bool) *Scan {
	return &Scan{
		Upper: w.upper, Lower: w.meta, Chunks: w.chunks, Store: w.store, Move: move,
		Logger: slog.New(slog.NewTextHandler(&w.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
}

// commit makes a layer of what was written in the mount, and of it and those below an image, which must be what the
// mount showed.
func (w *world) commit(t *testing.T, allow func(integration.Difference) bool) *toc.TOC {
	t.Helper()
	want := snapshot(t, w.mnt)
	before := w.objects(t)
	copied, err := w.scan(false).TOC(context.Background())
	must(t, err)
	must(t, unix.Unmount(w.mnt, 0))
	must(t, unix.Mount("none", w.mnt, "tmpfs", 0, "")) // what unmounts it finds something
	if err := checkOrder(copied); err != nil {
		t.Error(err)
	}
	w.check(t, copied, before)
	l, err := w.scan(true).TOC(context.Background())
	must(t, err)
	if l.Digest != copied.Digest {
		t.Errorf("the layer's digest is %v when files are copied, %v when they are moved", copied.Digest, l.Digest)
	}
	w.check(t, l, before)
	w.unmount()
	w.layers = append(w.layers, l)
	w.mount(t, false)
	defer func() { w.unmount() }()
	for _, d := range integration.Compare(want, snapshot(t, w.mnt)) {
		if allow == nil || !allow(d) {
			t.Error(d)
		}
	}
	return l
}

// objects returns the names of all objects in the store.
func (w *world) objects(t testing.TB) map[string]bool {
	t.Helper()
	all := map[string]bool{}
	must(t, filepath.WalkDir(w.store.Objects(), func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			all[path] = true
		}
		return err
	}))
	return all
}

// check has every object of the layer be what it says. Those in before were there before.
func (w *world) check(t testing.TB, l *toc.TOC, before map[string]bool) {
	t.Helper()
	if tmp, err := os.ReadDir(w.store.Path("tmp")); err != nil || len(tmp) > 0 {
		t.Errorf("left in the store's tmp: %v %v", tmp, err)
	}
	for i := range l.Entries {
		e := &l.Entries[i]
		chunks := l.Content(e)
		if len(chunks) == 0 {
			continue
		}
		path := filepath.Join(w.store.Objects(), store.Key(toc.ObjectKey(chunks)).Path())
		b, err := os.ReadFile(path)
		must(t, err)
		if int64(len(b)) != e.Size {
			t.Errorf("%q: object of %d bytes, want %d", e.Name, len(b), e.Size)
			continue
		}
		for _, c := range chunks {
			if sha256.Sum256(b[c.FileOffset:][:c.Size]) != c.Digest || c.Member != 0 || c.Inner != 0 || c.Hole {
				t.Errorf("%q: chunk at %d is not what it says", e.Name, c.FileOffset)
			}
		}
		if before[path] {
			continue
		}
		var st unix.Stat_t
		must(t, unix.Lstat(path, &st))
		n, err := unix.Llistxattr(path, nil)
		if st.Mode != unix.S_IFREG|0o444 || st.Uid != 0 || st.Gid != 0 || st.Nlink != 1 || n != 0 || err != nil {
			t.Errorf("%q: object with mode %o, owner %d:%d, %d links, %d bytes of xattrs, %v", e.Name, st.Mode, st.Uid, st.Gid, st.Nlink, n, err)
		}
	}
}

// checkOrder reports entries that are not in the order that TOC promises.
func checkOrder(l *toc.TOC) error {
	seen := map[string]bool{}
	for i, e := range l.Entries {
		if seen[e.Name] || (e.Name == "") != (i == 0) {
			return fmt.Errorf("entry %d: %q is there twice or is not where it should be", i, e.Name)
		}
		seen[e.Name] = true
		if i > 0 && !seen[parent(e.Name)] {
			return fmt.Errorf("%q comes before its directory", e.Name)
		}
		if e.Type == toc.Hardlink && !seen[e.Link] {
			return fmt.Errorf("%q comes before the file that it links to", e.Name)
		}
	}
	return nil
}

func parent(name string) string {
	if i := strings.LastIndexByte(name, '/'); i >= 0 {
		return name[:i]
	}
	return ""
}

// An entry of a tar.
type entry struct {
	tar.Header
	content string
}

var epoch = time.Unix(1_500_000_000, 123_456_789)

func directory(name string, mode int64) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: mode, ModTime: epoch}}
}

func regular(name, content string) entry {
	return entry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, ModTime: epoch, Uid: 7, Gid: 8}, content}
}

func link(typ byte, name, to string) entry {
	return entry{Header: tar.Header{Typeflag: typ, Name: name, Linkname: to, Mode: 0o777, ModTime: epoch}}
}

// text returns n bytes that no other seed has.
func text(seed string, n int) string {
	return strings.Repeat(seed+" ", n/(len(seed)+1)+1)[:n]
}

const chunk = toc.DefaultChunkSize

var longName = strings.Repeat("l", 255)

// base is the lower layer: something of everything.
func base() []entry {
	withXattrs := regular("d/xattrs", "with xattrs")
	withXattrs.PAXRecords = map[string]string{
		"SCHILY.xattr.user.a":              "1",
		"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
	}
	setuid := regular("d/setuid", "setuid")
	setuid.Mode = 0o4755
	list := []entry{
		directory("./", 0o755),
		directory("d", 0o750),
		regular("d/empty", ""), regular("d/one", "1"), regular("d/chunk", text("chunk", chunk)), regular("d/large", text("large", 3*chunk+1)),
		withXattrs, setuid,
		link(tar.TypeSymlink, "d/symlink", "../e/x"), link(tar.TypeSymlink, "d/todir", "sub"),
		{Header: tar.Header{Typeflag: tar.TypeChar, Name: "d/null", Mode: 0o666, Devmajor: 1, Devminor: 3, ModTime: epoch}},
		{Header: tar.Header{Typeflag: tar.TypeFifo, Name: "d/fifo", Mode: 0o600, ModTime: epoch}},
		directory("d/sub", 0o700), regular("d/sub/a", "a"), regular("d/sub/b", "b"), directory("d/sub/deep", 0o755), regular("d/sub/deep/c", "c"), regular("d/sub/deep/d", "dd"),
		regular("d/link1", "linked"), link(tar.TypeLink, "d/link2", "d/link1"),
		directory("e", 0o1777), regular("e/x", "x"), regular("e/y", "yy"),
		regular(longName, "long"),
		regular("top", "top"),
	}
	list[len(list)-1].Mode = 0o600
	for i := range list {
		if list[i].Name == "d/link2" {
			list[i].Mode, list[i].Uid, list[i].Gid = 0o644, 7, 8
		}
	}
	return list
}

func mustLog(t *testing.T, w *world, parts ...string) {
	t.Helper()
	for line := range strings.SplitSeq(w.log.String(), "\n") {
		all := true
		for _, p := range parts {
			all = all && strings.Contains(line, p)
		}
		if all {
			return
		}
	}
	t.Errorf("no line with %q in the log:\n%s", parts, w.log.String())
}

// memory returns a directory on a tmpfs, which is another file system than others and has ACLs.
func memory(t testing.TB) string {
	t.Helper()
	needRoot(t)
	dir := t.TempDir()
	must(t, unix.Mount("none", dir, "tmpfs", 0, ""))
	t.Cleanup(unmounter(t, dir))
	return dir
}
