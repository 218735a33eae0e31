package meta

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"lazuli/fs/toc"
)

// worst is a layer with all that is hard to write down: every size at which something
// no longer fits where it was. Its entries have no whiteouts, links or implicit parents.
func worst() *toc.TOC {
	l := &toc.TOC{}
	add := func(e toc.Entry) {
		if e.Mode == 0 {
			e.Mode = 0o644
		}
		e.MTime, e.MTimeNsec = int64(len(l.Entries))*1e8-1e12, uint32(len(l.Entries)*7919%1e9)
		l.Entries = append(l.Entries, e)
	}
	dir := func(name string) { add(toc.Entry{Name: name, Type: toc.Directory, Mode: 0o755}) }
	file := func(name string) { add(toc.Entry{Name: name, Type: toc.Regular}) }
	data := func(name string, sizes ...int64) {
		e := toc.Entry{Name: name, Type: toc.Regular, FirstChunk: uint32(len(l.Chunks)), NumChunks: uint32(len(sizes))}
		for _, size := range sizes {
			c := toc.Chunk{FileOffset: e.Size, Size: size, Digest: sha256.Sum256(fmt.Append(nil, name, e.Size))}
			l.Chunks = append(l.Chunks, c)
			e.Size += size
		}
		add(e)
	}

	dir("names")
	for _, n := range []string{
		"!", "-", ".-", "...", "..a", ".a", "/"[:0] + "\x01", "\xff", "\xff\xfe", "a b", "a\nb", "a\tb", "\\", "ä", "a", "A", "aa", "a.", "a-",
		strings.Repeat("x", 254), strings.Repeat("x", 255), strings.Repeat("\xe4", 255), strings.Repeat("x", 254) + "y",
	} {
		file("names/" + n)
	}
	long := "long"
	dir(long)
	for len(long)+256 <= maxPath {
		long += "/" + strings.Repeat("d", 255)
		dir(long)
	}
	file(long + "/" + strings.Repeat("f", maxPath-1-len(long)))

	dir("links")
	for _, n := range []int{1, 59, 60, 61, 100, 2047, 2048, 2049, 3900, 4000, 4031, 4032, 4033, 4094, 4095} {
		add(toc.Entry{Name: fmt.Sprintf("links/%04d", n), Type: toc.Symlink, Link: strings.Repeat("l/", n)[:n]})
	}
	add(toc.Entry{Name: "links/loop", Type: toc.Symlink, Link: "loop"})
	add(toc.Entry{Name: "links/bytes", Type: toc.Symlink, Link: "\xff \n/"})

	// Directories around every size at which their tail moves or a block is full:
	// names of 4 and 5 bytes, and 5 for "." and "..", with 12 bytes each.
	for i := range 300 {
		dir(fmt.Sprintf("dir%03d", i))
		for j := range i {
			file(fmt.Sprintf("dir%03d/%04d%s", i, j, strings.Repeat("p", j%(i%7+1))))
		}
	}

	// A block that is full to the last byte: 27 bytes for "." and "..", 15*267, 64;
	// alone, and with another behind it.
	for i, n := range []string{"full", "full2"} {
		dir(n)
		for j := range 15 {
			file(fmt.Sprintf("%s/%0255d", n, j))
		}
		file(n + "/" + strings.Repeat("x", 52))
		if i == 1 {
			file(n + "/y")
		}
	}

	dir("sizes")
	data("sizes/1", 1)
	data("sizes/two", 1, 2)
	for _, n := range []int64{4095, 4096, 4097, 1<<31 - 1, 1 << 31, 1<<32 - 1, 1 << 32, 3 << 30, chunkSize - 1, chunkSize, chunkSize + 1, maxFileSize} {
		data(fmt.Sprintf("sizes/%d", n), n)
	}
	data("sizes/many", slices.Repeat([]int64{128 << 10}, 1000)...)

	dir("xattrs")
	for _, n := range []int{0, 1, 2, 3, 4, 5, 100, 1000, 3000, 4000, 4096, 5000, 8192, 60_000} {
		for _, typ := range []toc.Type{toc.Regular, toc.Directory, toc.Symlink} {
			e := toc.Entry{
				Name: fmt.Sprintf("xattrs/%d-%d", n, typ), Type: typ, Mode: 0o755,
				Xattrs: []toc.Xattr{
					{Name: "security.a", Value: strings.Repeat("v", n)},
					{Name: "security." + strings.Repeat("n", 246), Value: "\x00\xff"},
					{Name: "security.shared", Value: strings.Repeat("s", min(n, 10))},
				},
			}
			if typ == toc.Symlink {
				e.Link, e.Mode = "x", 0o777
			}
			add(e)
		}
	}
	many := toc.Entry{Name: "xattrs/many", Type: toc.Directory, Mode: 0o700}
	for i := range 600 { // more than can be shared
		many.Xattrs = append(many.Xattrs, toc.Xattr{Name: fmt.Sprintf("user.%d", i), Value: "v"})
	}
	add(many)
	many.Name = "xattrs/many2"
	add(many)

	add(toc.Entry{Name: "owner", Type: toc.Regular, UID: 1<<32 - 2, GID: 1<<32 - 3, Mode: 0o7777})
	add(toc.Entry{Name: "dev", Type: toc.CharDevice, Major: 4095, Minor: 1<<20 - 1})
	add(toc.Entry{Name: "dev2", Type: toc.BlockDevice, Minor: 256})
	return l
}

// expected returns what a reader should see of a layer like worst.
func expected(l *toc.TOC) (files []file) {
	files = append(files, file{mode: unix.S_IFDIR | 0o755, xattrs: map[string]string{}})
	subdirs := map[string]int{}
	for i := range l.Entries {
		e := &l.Entries[i]
		f := file{
			name: e.Name, mode: e.Mode, uid: e.UID, gid: e.GID, size: e.Size, sec: e.MTime, nsec: int64(e.MTimeNsec),
			links: 1, link: e.Link, xattrs: map[string]string{},
		}
		for _, x := range e.Xattrs {
			f.xattrs[x.Name] = x.Value
		}
		switch e.Type {
		case toc.Regular:
			f.mode |= unix.S_IFREG
			if e.Size > 0 {
				f.xattrs[metacopyXattr] = ""
				f.xattrs[redirectXattr] = redirect(toc.ObjectKey(l.Content(e)))
			}
		case toc.Directory:
			f.mode |= unix.S_IFDIR
			dir, _ := split(e.Name)
			subdirs[dir]++
		case toc.Symlink:
			f.mode = unix.S_IFLNK | 0o777
			f.size = int64(len(e.Link))
		case toc.CharDevice:
			f.mode |= unix.S_IFCHR
			f.rdev = uint32(unix.Mkdev(e.Major, e.Minor))
		case toc.BlockDevice:
			f.mode |= unix.S_IFBLK
			f.rdev = uint32(unix.Mkdev(e.Major, e.Minor))
		}
		files = append(files, f)
	}
	for i := range files {
		if files[i].mode&unix.S_IFMT == unix.S_IFDIR {
			files[i].links = 2 + subdirs[files[i].name]
		}
	}
	return files
}

func diffFiles(t *testing.T, want, got []file) {
	t.Helper()
	norm := func(files []file) map[string]file {
		m := map[string]file{}
		for _, f := range files {
			f.ino = 0
			if f.mode&unix.S_IFMT == unix.S_IFDIR {
				f.size = 0
			}
			m[f.name] = f
		}
		return m
	}
	if len(want) != len(got) {
		t.Errorf("%d files, want %d", len(got), len(want))
	}
	if d := gocmp.Diff(norm(want), norm(got), gocmp.AllowUnexported(file{})); d != "" {
		t.Errorf("files (-want +got):\n%.4000s", d)
	}
}

func TestWorst(t *testing.T) {
	l := worst()
	image := build(t, []*toc.TOC{l})
	t.Run("fsck", func(t *testing.T) { fsck(t, image) })
	t.Run("go-erofs", func(t *testing.T) { diffFiles(t, expected(l), readErofs(t, image)) })
	t.Run("kernel", func(t *testing.T) {
		needMounts(t)
		dir := mountImage(t, image)
		diffFiles(t, expected(l), readDir(t, dir))
		for _, name := range []string{"names/b", "names/" + strings.Repeat("x", 253), "dir299/0001", "dir299/9999p", "dir000/x", "zzz", " "} {
			if err := unix.Lstat(filepath.Join(dir, name), new(unix.Stat_t)); !errors.Is(err, unix.ENOENT) {
				t.Errorf("lstat %q: %v", name, err)
			}
		}
	})
}

// A directory of many blocks is searched by halves: every name must be found.
func TestLargeDirectory(t *testing.T) {
	l := &toc.TOC{}
	for i := range 100_000 {
		l.Entries = append(l.Entries, toc.Entry{Name: fmt.Sprintf("d/%d", i*7), Type: toc.FIFO})
	}
	image := build(t, []*toc.TOC{l})
	fsck(t, image)
	needMounts(t)
	dir := mountImage(t, image)
	names, err := os.ReadDir(filepath.Join(dir, "d"))
	if err != nil || len(names) != len(l.Entries) {
		t.Fatalf("readdir: %d names, %v", len(names), err)
	}
	for i := range l.Entries {
		if err := unix.Lstat(filepath.Join(dir, l.Entries[i].Name), new(unix.Stat_t)); err != nil {
			t.Fatalf("lstat %s: %v", l.Entries[i].Name, err)
		}
	}
}

// TestOverlay reads files through overlayfs, whose data-only layer has the objects.
func TestOverlay(t *testing.T) {
	needMounts(t)
	l := layerOf(t, "d/f =content 4755 {user.a=b}", "d/h == d/f 4755", "empty", "l -> d/f", "d/missing =missing")
	// A file of two chunks beside those of one.
	e := toc.Entry{Name: "two", Type: toc.Regular, Mode: 0o600, Size: 10, FirstChunk: uint32(len(l.Chunks)), NumChunks: 2}
	l.Entries = append(l.Entries, e)
	l.Chunks = append(l.Chunks, toc.Chunk{Digest: sha256.Sum256([]byte("01234")), Size: 5}, toc.Chunk{Digest: sha256.Sum256([]byte("56789")), FileOffset: 5, Size: 5})
	contents := map[string]string{"d/f": "content", "two": "0123456789"}

	tree, err := Merge([]*toc.TOC{l})
	if err != nil {
		t.Fatal(err)
	}
	objects := t.TempDir()
	var names []string
	for o := range tree.Objects() {
		e := &l.Entries[o.Entry]
		names = append(names, e.Name)
		if o.Layer != 0 || o.Key != toc.ObjectKey(l.Content(e)) {
			t.Errorf("%s: object %+v", e.Name, o)
		}
		if c, ok := contents[e.Name]; ok {
			path := filepath.Join(objects, redirect(o.Key))
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(c), 0o444); err != nil {
				t.Fatal(err)
			}
		}
	}
	slices.Sort(names)
	if d := gocmp.Diff([]string{"d/f", "d/missing", "two"}, names); d != "" {
		t.Errorf("objects (-want +got):\n%s", d)
	}

	var image bytes.Buffer
	if _, err := tree.WriteTo(&image); err != nil {
		t.Fatal(err)
	}
	work := t.TempDir()
	for _, d := range []string{"upper", "work"} {
		if err := os.Mkdir(filepath.Join(work, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	opts := fmt.Sprintf("lowerdir=%s::%s,upperdir=%s/upper,workdir=%s/work,metacopy=on,redirect_dir=on", mountImage(t, image.Bytes()), objects, work, work)
	root := mount(t, "-t", "overlay", "-o", opts, "overlay")

	// chmod copies up metadata, and must not lose the content.
	if err := os.Chmod(filepath.Join(root, "two"), 0o640); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"d/f": "content", "d/h": "content", "l": "content", "two": "0123456789", "empty": ""} {
		got, err := os.ReadFile(filepath.Join(root, name))
		if err != nil || string(got) != want {
			t.Errorf("%s: %q, %v, want %q", name, got, err, want)
		}
	}
	if _, err := os.ReadFile(filepath.Join(root, "d/missing")); err == nil {
		t.Error("read of an object that is not there: no error")
	}
	files := readDirNoOpen(t, filepath.Join(root, "d"))
	want := []string{"f 104755 n=2 size=7 {user.a=b}", "h 104755 n=2 size=7 {user.a=b}", "missing 100644 n=1 size=7 {}"}
	if d := gocmp.Diff(want, files); d != "" {
		t.Errorf("files (-want +got):\n%s", d)
	}
}

// readDirNoOpen lists a directory of an overlay: its xattrs of overlayfs are hidden, and its
// files need not have content.
func readDirNoOpen(t *testing.T, dir string) (out []string) {
	names, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		var st unix.Stat_t
		var buf [1024]byte
		name := filepath.Join(dir, n.Name())
		if err := unix.Lstat(name, &st); err != nil {
			t.Fatal(err)
		}
		size, err := unix.Llistxattr(name, buf[:])
		if err != nil {
			t.Fatal(err)
		}
		var xattrs []string
		for k := range strings.SplitSeq(strings.TrimRight(string(buf[:size]), "\x00"), "\x00") {
			if k != "" {
				size, _ := unix.Lgetxattr(name, k, buf[:])
				xattrs = append(xattrs, k+"="+string(buf[:size]))
			}
		}
		out = append(out, fmt.Sprintf("%s %o n=%d size=%d {%s}", n.Name(), st.Mode, st.Nlink, st.Size, strings.Join(xattrs, ",")))
	}
	return out
}

func TestDeterministic(t *testing.T) {
	layers := append(sample(1000), worst())
	want := build(t, layers)
	for range 3 {
		if !bytes.Equal(want, build(t, layers)) {
			t.Fatal("another image from the same layers")
		}
	}
	other := *layers[0]
	other.Digest[0]++
	if bytes.Equal(want[:superOffset+superSize], build(t, append([]*toc.TOC{&other}, layers[1:]...))[:superOffset+superSize]) {
		t.Error("the same UUID for another layer")
	}
}

func TestStats(t *testing.T) {
	tree, err := Merge([]*toc.TOC{layerOf(t, "a =12345", "b == a", "d/c =123"), layerOf(t, ".wh.a", "e")})
	if err != nil {
		t.Fatal(err)
	}
	if want, got := (Stats{Inodes: 5, Entries: 4, Bytes: 3 * blockSize, RegularBytes: 8}), tree.Stats(); got != want {
		t.Errorf("Stats %+v, want %+v", got, want)
	}
}

func TestBounds(t *testing.T) {
	many := &toc.TOC{Entries: make([]toc.Entry, toc.MaxEntries/2+1)}
	regular := func(e toc.Entry, chunks ...toc.Chunk) []*toc.TOC {
		e.Name, e.Type = "f", toc.Regular
		return []*toc.TOC{{Entries: []toc.Entry{e}, Chunks: chunks}}
	}
	var implicit []toc.Entry
	for i := range toc.MaxEntries/2000 + 1 {
		implicit = append(implicit, toc.Entry{Name: fmt.Sprintf("%d/%s", i, strings.Repeat("d/", 2000)+"f"), Type: toc.FIFO})
	}
	var huge []toc.Entry
	for i := range 1 << 19 {
		huge = append(huge, toc.Entry{Name: fmt.Sprint(i), Type: toc.Regular, Size: maxFileSize, NumChunks: 1})
	}
	for _, tt := range []struct {
		name   string
		layers []*toc.TOC
		want   string
	}{
		{"no layers", nil, "image has no layers"},
		{"entries", []*toc.TOC{many, many}, "layer 1: image has more than 2097152 entries"},
		{"implicit directories", []*toc.TOC{{Entries: implicit}}, "image has more than 2097152 names"},
		{"size", regular(toc.Entry{Size: 1 << 62, NumChunks: 1}, toc.Chunk{Size: 1 << 62}), "size 4611686018427387904: at most 17592186044416"},
		{"negative size", regular(toc.Entry{Size: -1}), "size -1"},
		{"no chunks", regular(toc.Entry{Size: 1}), "chunks of 0 bytes for 1"},
		{"chunks beyond", regular(toc.Entry{Size: 1, FirstChunk: 1<<32 - 1, NumChunks: 2}, toc.Chunk{Size: 1}), "chunks 4294967295 to 4294967297 of 1"},
		{"chunk of another place", regular(toc.Entry{Size: 1, NumChunks: 1}, toc.Chunk{Size: 1, FileOffset: 1}), "chunk at 1 of 1 bytes, after 0 of 1"},
		{"chunk too large", regular(toc.Entry{Size: 1, NumChunks: 1}, toc.Chunk{Size: 1<<63 - 1}), "chunk at 0 of 9223372036854775807 bytes"},
		{"chunks of an empty file", regular(toc.Entry{NumChunks: 1}, toc.Chunk{Size: 1}), "chunk at 0 of 1 bytes, after 0 of 0"},
		{"all sizes", []*toc.TOC{{Entries: huge, Chunks: []toc.Chunk{{Size: maxFileSize}}}}, "the image's files have more than 8 EiB"},
		{"nanoseconds", regular(toc.Entry{MTimeNsec: 1e9}), "modification time with 1000000000 nanoseconds"},
		{"xattr", regular(toc.Entry{Xattrs: []toc.Xattr{{Name: "user.a", Value: strings.Repeat("x", 65536)}}}), `"f": xattr user.a of 65536 bytes: at most 65535`},
		{"xattrs", regular(toc.Entry{Xattrs: []toc.Xattr{{Name: "user.a", Value: strings.Repeat("x", 40000)}, {Name: "user.b", Value: strings.Repeat("x", 40000)}}}), `"f": xattrs of 80028 bytes: at most 65535`},
		{"type", []*toc.TOC{{Entries: []toc.Entry{{Name: "f", Type: 77}}}}, `"f": unknown type 77`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := Merge(tt.layers); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Merge: %v\nwant %s", err, tt.want)
			}
		})
	}
}

// Short names must not buy long walks through symlinks.
func TestSymlinkBudget(t *testing.T) {
	l := &toc.TOC{}
	for i := range maxLinks {
		l.Entries = append(l.Entries, toc.Entry{Name: fmt.Sprint(i), Type: toc.Symlink, Link: fmt.Sprint(i + 1)})
	}
	for i := range maxLinksAll/maxLinks + 1 {
		l.Entries = append(l.Entries, toc.Entry{Name: fmt.Sprintf("0/%d/f", i), Type: toc.FIFO})
	}
	_, err := Merge([]*toc.TOC{l})
	if err == nil || !strings.Contains(err.Error(), "names lead through more than 1048576 symlinks") {
		t.Errorf("Merge: %v", err)
	}
	l.Entries = l.Entries[:len(l.Entries)-1]
	if _, err := Merge([]*toc.TOC{l}); err != nil {
		t.Errorf("Merge, one less: %v", err)
	}
}

// acl returns the xattr value of tag, permissions and id, in threes.
func acl(v ...uint32) string {
	b := binary.LittleEndian.AppendUint32(nil, 2)
	for ; len(v) > 0; v = v[3:] {
		b = binary.LittleEndian.AppendUint16(b, uint16(v[0]))
		b = binary.LittleEndian.AppendUint16(b, uint16(v[1]))
		b = binary.LittleEndian.AppendUint32(b, v[2])
	}
	return string(b)
}

func TestACL(t *testing.T) {
	const none = 1<<32 - 1
	full := acl(aclUserObj, 7, none, aclUser, 5, 1000, aclGroupObj, 5, none, aclMask, 7, none, aclOther, 0, none)
	after := acl(aclUserObj, 6, none, aclUser, 5, 1000, aclGroupObj, 5, none, aclMask, 4, none, aclOther, 1, none)
	minimal := acl(aclUserObj, 7, none, aclGroupObj, 5, none, aclOther, 0, none)
	with := func(name string, typ toc.Type, xattrs ...toc.Xattr) toc.Entry {
		return toc.Entry{Name: name, Type: typ, Mode: 0o641, Xattrs: xattrs}
	}
	l := &toc.TOC{Entries: []toc.Entry{
		with("d", toc.Directory, toc.Xattr{Name: aclAccess, Value: full}, toc.Xattr{Name: aclDefault, Value: full}),
		with("f", toc.Regular, toc.Xattr{Name: aclAccess, Value: full}),
		with("minimal", toc.Regular, toc.Xattr{Name: aclAccess, Value: minimal}),
		with("empty", toc.Directory, toc.Xattr{Name: aclAccess, Value: acl()}, toc.Xattr{Name: aclDefault, Value: acl()}),
	}}
	image := build(t, []*toc.TOC{l})
	want := map[string]map[string]string{"": {}, "d": {aclAccess: after, aclDefault: full}, "f": {aclAccess: after}, "minimal": {}, "empty": {}}
	show := func(t *testing.T, files []file) {
		got := map[string]map[string]string{}
		for _, f := range files {
			got[f.name] = f.xattrs
		}
		if d := gocmp.Diff(want, got); d != "" {
			t.Errorf("xattrs (-want +got):\n%s", d)
		}
	}
	t.Run("go-erofs", func(t *testing.T) { show(t, readErofs(t, image)) })
	t.Run("kernel", func(t *testing.T) {
		needMounts(t)
		show(t, readDir(t, mountImage(t, image)))
	})

	for name, v := range map[string]string{
		"version":  "\x01\x00\x00\x00",
		"length":   full + "x",
		"order":    acl(aclOther, 0, none, aclUserObj, 7, none, aclGroupObj, 5, none),
		"twice":    acl(aclUserObj, 7, none, aclUserObj, 7, none, aclGroupObj, 5, none, aclOther, 0, none),
		"tag":      acl(aclUserObj, 7, none, aclGroupObj, 5, none, aclOther, 0, none, 0x40, 0, none),
		"bits":     acl(aclUserObj, 8, none, aclGroupObj, 5, none, aclOther, 0, none),
		"no mask":  acl(aclUserObj, 7, none, aclUser, 5, 1, aclGroupObj, 5, none, aclOther, 0, none),
		"no other": acl(aclUserObj, 7, none, aclGroupObj, 5, none),
	} {
		if _, err := Merge([]*toc.TOC{{Entries: []toc.Entry{with("f", toc.Regular, toc.Xattr{Name: aclAccess, Value: v})}}}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, err := Merge([]*toc.TOC{{Entries: []toc.Entry{with("f", toc.Regular, toc.Xattr{Name: aclDefault, Value: full})}}}); err == nil {
		t.Error("default ACL of a file: no error")
	}
}

// failing takes n bytes.
type failing struct{ n int }

func (f *failing) Write(p []byte) (int, error) {
	n := min(f.n, len(p))
	f.n -= n
	if n < len(p) {
		return n, unix.ENOSPC
	}
	return n, nil
}

func TestWriteError(t *testing.T) {
	tree, err := Merge(sample(20_000))
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{0, 1, 200_000, int(tree.Stats().Bytes) - 1} {
		if got, err := tree.WriteTo(&failing{n}); !errors.Is(err, unix.ENOSPC) || got != int64(n) {
			t.Errorf("disk of %d bytes: wrote %d, %v", n, got, err)
		}
	}
}
