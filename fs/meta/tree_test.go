package meta

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/erofs/go-erofs"
	gocmp "github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"lazuli/fs/toc"
)

// The tests write layers and trees in the same words, one line for each file:
//
//	a/                 a directory; "/" is the root
//	a/f =text          a regular file with that content; without "=" it is empty
//	a/l -> target      a symlink
//	a/h == a/f         another name of a/f
//	a/c c1:3           a device, or b1:3; a FIFO is "|"
//
// followed by what differs from the default: mode (0755 of a directory, 0644), owner (0:0),
// @time in seconds and nanoseconds (0), {xattr=value}, and in a tree n=links (1, or what
// belongs to the subdirectories).

// capValue is a value of security.capability, which the lines call CAP.
const capValue = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// layerOf returns the TOC of a layer with these entries.
func layerOf(t testing.TB, lines ...string) *toc.TOC {
	l := &toc.TOC{}
	for _, line := range lines {
		words := strings.Fields(line)
		e := toc.Entry{Name: words[0], Type: toc.Regular, Mode: 0o644}
		if name, ok := strings.CutSuffix(e.Name, "/"); ok {
			e.Name, e.Type, e.Mode = name, toc.Directory, 0o755
		}
		for i := 1; i < len(words); i++ {
			w := words[i]
			major, minor, pair := strings.Cut(strings.TrimLeft(w, "bc@"), ":")
			num := func(s string) uint32 {
				n, err := strconv.ParseUint(s, 10, 32)
				if err != nil {
					t.Fatalf("%q: %v", line, err)
				}
				return uint32(n)
			}
			switch {
			case w == "->":
				i++
				e.Type, e.Mode, e.Link = toc.Symlink, 0o777, words[i]
			case w == "==":
				i++
				e.Type, e.Link = toc.Hardlink, words[i]
			case w == "|":
				e.Type = toc.FIFO
			case w[0] == '=':
				e.Size = int64(len(w) - 1)
				e.FirstChunk, e.NumChunks = uint32(len(l.Chunks)), 1
				l.Chunks = append(l.Chunks, toc.Chunk{Digest: sha256.Sum256([]byte(w[1:])), Size: e.Size})
			case w[0] == '@':
				sec, nsec, _ := strings.Cut(w[1:], ".")
				e.MTime, _ = strconv.ParseInt(sec, 10, 64)
				if nsec != "" {
					e.MTimeNsec = num(nsec)
				}
			case w[0] == '{':
				for _, x := range strings.Split(strings.Trim(w, "{}"), ",") {
					name, value, _ := strings.Cut(x, "=")
					if value == "CAP" {
						value = capValue
					}
					e.Xattrs = append(e.Xattrs, toc.Xattr{Name: name, Value: value})
				}
			case w[0] == 'c' && pair:
				e.Type, e.Major, e.Minor = toc.CharDevice, num(major), num(minor)
			case w[0] == 'b' && pair:
				e.Type, e.Major, e.Minor = toc.BlockDevice, num(major), num(minor)
			case pair:
				e.UID, e.GID = num(major), num(minor)
			default:
				mode, err := strconv.ParseUint(w, 8, 32)
				if err != nil {
					t.Fatalf("%q: %v", line, err)
				}
				e.Mode = uint32(mode)
			}
		}
		l.Entries = append(l.Entries, e)
	}
	return l
}

// A file is what a reader of an image sees of one name.
type file struct {
	name      string
	mode      uint32 // with the type
	uid, gid  uint32
	size      int64
	sec, nsec int64
	links     int
	rdev      uint32 // as Linux encodes it
	ino       uint64
	link      string // a symlink's target
	xattrs    map[string]string
}

const (
	redirectXattr = redirectName
	metacopyXattr = "trusted.overlay.metacopy"
)

// lines formats files, which are sorted as a walk sees them, with the root first if it says anything.
func lines(t *testing.T, files []file, contents map[string]string) []string {
	var out []string
	first := map[uint64]string{}
	subdirs := map[string]int{}
	for _, f := range files {
		if f.mode&unix.S_IFMT == unix.S_IFDIR && f.name != "" {
			dir, _ := split(f.name)
			subdirs[dir]++
		}
	}
	for _, f := range files {
		s := f.name
		mode, def, links := f.mode&0o7777, uint32(0o644), 1
		redirect, hasRedirect := f.xattrs[redirectXattr]
		metacopy, hasMetacopy := f.xattrs[metacopyXattr]
		if data := f.mode&unix.S_IFMT == unix.S_IFREG && f.size > 0; hasRedirect != data || hasMetacopy != data || metacopy != "" {
			t.Errorf("%q of size %d: redirect %q %v, metacopy %q %v", f.name, f.size, redirect, hasRedirect, metacopy, hasMetacopy)
		}
		same := ""
		switch f.mode & unix.S_IFMT {
		case unix.S_IFDIR:
			s += "/"
			def, links = 0o755, 2+subdirs[f.name]
		default:
			same = first[f.ino]
			if same == "" {
				first[f.ino] = f.name
			}
		}
		switch f.mode & unix.S_IFMT {
		case unix.S_IFREG:
			if f.size > 0 {
				c, ok := contents[redirect]
				if !ok {
					c = redirect
				}
				s += " =" + c
				if int(f.size) != len(c) && ok {
					s += fmt.Sprintf(" size=%d", f.size)
				}
			}
		case unix.S_IFLNK:
			s += " -> " + f.link
			def = 0o777
		case unix.S_IFIFO:
			s += " |"
		case unix.S_IFCHR:
			s += fmt.Sprintf(" c%d:%d", unix.Major(uint64(f.rdev)), unix.Minor(uint64(f.rdev)))
		case unix.S_IFBLK:
			s += fmt.Sprintf(" b%d:%d", unix.Major(uint64(f.rdev)), unix.Minor(uint64(f.rdev)))
		}
		if mode != def {
			s += fmt.Sprintf(" %o", mode)
		}
		if f.uid != 0 || f.gid != 0 {
			s += fmt.Sprintf(" %d:%d", f.uid, f.gid)
		}
		if f.sec != 0 || f.nsec != 0 {
			s += fmt.Sprintf(" @%d", f.sec)
			if f.nsec != 0 {
				s += fmt.Sprintf(".%d", f.nsec)
			}
		}
		var xattrs []string
		for k, v := range f.xattrs {
			if v == capValue {
				v = "CAP"
			}
			if k != redirectXattr && k != metacopyXattr {
				xattrs = append(xattrs, k+"="+v)
			}
		}
		if len(xattrs) > 0 {
			slices.Sort(xattrs)
			s += " {" + strings.Join(xattrs, ",") + "}"
		}
		if f.links != links && (f.name != "" || f.links != 1) {
			s += fmt.Sprintf(" n=%d", f.links)
		}
		if same != "" {
			s += " == " + same
		}
		if s != "/" {
			out = append(out, s)
		}
	}
	return out
}

// readErofs reads an image with go-erofs.
func readErofs(t *testing.T, image []byte) (files []file) {
	t.Helper()
	img, err := erofs.Open(bytes.NewReader(image))
	if err != nil {
		t.Fatal(err)
	}
	err = fs.WalkDir(img, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		st := fi.Sys().(*erofs.Stat)
		f := file{
			name: name, mode: uint32(st.Mode.Perm()), uid: st.UID, gid: st.GID, size: st.Size,
			sec: int64(st.Mtime), nsec: int64(st.MtimeNs), links: st.Nlink, rdev: st.Rdev, ino: uint64(st.Ino),
			xattrs: map[string]string{},
		}
		if name == "." {
			f.name = ""
		}
		for k, v := range st.Xattrs {
			f.xattrs[strings.TrimSuffix(k, ".")] = v // go-erofs puts a dot behind the names of ACLs
		}
		for bit, m := range map[fs.FileMode]uint32{fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000} {
			if st.Mode&bit != 0 {
				f.mode |= m
			}
		}
		switch st.Mode.Type() {
		case 0:
			f.mode |= unix.S_IFREG
		case fs.ModeDir:
			f.mode |= unix.S_IFDIR
		case fs.ModeNamedPipe:
			f.mode |= unix.S_IFIFO
		case fs.ModeDevice:
			f.mode |= unix.S_IFBLK
		case fs.ModeDevice | fs.ModeCharDevice:
			f.mode |= unix.S_IFCHR
		case fs.ModeSymlink:
			f.mode |= unix.S_IFLNK
			f.link, err = fs.ReadLink(img, name)
		}
		files = append(files, f)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// readDir reads what the kernel shows of a mounted tree.
func readDir(t *testing.T, root string) (files []file) {
	t.Helper()
	t.Chdir(root) // the longest names leave no room for a prefix
	var buf [64 << 10]byte
	err := filepath.WalkDir(".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(name, &st); err != nil {
			return fmt.Errorf("%s: lstat: %w", name, err)
		}
		f := file{
			name: name, mode: st.Mode, uid: st.Uid, gid: st.Gid, size: st.Size,
			sec: st.Mtim.Sec, nsec: st.Mtim.Nsec, links: int(st.Nlink), rdev: uint32(st.Rdev), ino: st.Ino, xattrs: map[string]string{},
		}
		if name == "." {
			f.name = ""
		}
		if st.Mode&unix.S_IFMT == unix.S_IFLNK {
			if f.link, err = os.Readlink(name); err != nil {
				return err
			}
		}
		n, err := unix.Llistxattr(name, buf[:])
		if err != nil {
			return fmt.Errorf("%s: listxattr: %w", name, err)
		}
		for k := range strings.SplitSeq(string(buf[:n]), "\x00") {
			if k == "" {
				continue
			}
			if _, ok := f.xattrs[k]; ok {
				return fmt.Errorf("%s: xattr %s twice", name, k)
			}
			n, err := unix.Lgetxattr(name, k, buf[:])
			if err != nil {
				return fmt.Errorf("%s: getxattr %s: %w", name, k, err)
			}
			f.xattrs[k] = string(buf[:n])
		}
		// What is found by name must be what is found by listing.
		if st.Mode&unix.S_IFMT == unix.S_IFREG {
			fd, err := os.Open(name)
			if err != nil {
				return err
			}
			fd.Close()
		}
		files = append(files, f)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// needMounts skips the test where it may not mount images.
func needMounts(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount")
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		t.Skip("needs loop devices: ", err)
	}
}

// mountImage has the kernel mount an image and returns where.
func mountImage(t testing.TB, image []byte) string {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "meta.erofs")
	if err := os.WriteFile(file, image, 0o600); err != nil {
		t.Fatal(err)
	}
	return mount(t, "-t", "erofs", "-o", "loop,ro", file)
}

// mount runs mount(8) with a new directory as the last argument.
func mount(t testing.TB, args ...string) string {
	t.Helper()
	dir := t.TempDir()
	if out, err := exec.Command("mount", append(args, dir)...).CombinedOutput(); err != nil {
		t.Fatalf("mount %v: %v\n%s", args, err, out)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// fsck checks an image with erofs-utils.
func fsck(t *testing.T, image []byte) {
	t.Helper()
	tool, err := exec.LookPath("fsck.erofs")
	if err != nil {
		t.Skip("needs erofs-utils")
	}
	file := filepath.Join(t.TempDir(), "meta.erofs")
	if err := os.WriteFile(file, image, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(tool, file).CombinedOutput(); err != nil {
		t.Errorf("fsck.erofs: %v\n%s", err, out)
	}
}

func build(t testing.TB, layers []*toc.TOC) []byte {
	t.Helper()
	var b bytes.Buffer
	stats, err := Build(&b, layers)
	if err != nil {
		t.Fatal(err)
	}
	if stats.Bytes != int64(b.Len()) || b.Len()%blockSize != 0 {
		t.Errorf("image of %d bytes, Stats say %d", b.Len(), stats.Bytes)
	}
	return b.Bytes()
}

// redirect returns the value of the xattr for an object.
func redirect(key toc.Digest) string {
	h := hex.EncodeToString(key[:])
	return "/" + h[:1] + "/" + h[1:]
}

// check builds the image of the layers and has every reader show it.
func check(t *testing.T, layers []*toc.TOC, contents map[string]string, want []string) {
	t.Helper()
	image := build(t, layers)
	byName := func(a, b file) int { return cmp.Compare(a.name, b.name) }
	slices.Sort(want)
	show := func(t *testing.T, files []file) {
		slices.SortFunc(files, byName) // so that names of an inode are in one order
		got := lines(t, files, contents)
		slices.Sort(got)
		if d := gocmp.Diff(want, got); d != "" {
			t.Errorf("tree (-want +got):\n%s", d)
		}
	}
	t.Run("go-erofs", func(t *testing.T) { show(t, readErofs(t, image)) })
	t.Run("fsck", func(t *testing.T) { fsck(t, image) })
	t.Run("kernel", func(t *testing.T) {
		needMounts(t)
		show(t, readDir(t, mountImage(t, image)))
	})
}

// TestMerge has the rules of containerd's unpacker and of overlayfs, one case each.
// They were checked against containerd 2.4.2 on ext4.
func TestMerge(t *testing.T) {
	type layers [][]string
	for _, tt := range []struct {
		name   string
		layers layers
		want   []string
	}{
		{"nothing", layers{{}}, nil},
		{"root", layers{{"/ 700 1:2 @3", "a/"}, {"b/"}}, []string{"/ 700 1:2 @3", "a/", "b/"}},
		{"every type", layers{{
			"d/ 1777 70000:80000 @-1.5", "d/f =x 4755", "d/e 600", "d/l -> ../nowhere 600 1:1", "d/p | 640", "d/c c4:300 600", "d/b b259:70000",
		}}, []string{
			"d/ 1777 70000:80000 @-1.5", "d/f =x 4755", "d/e 600", "d/l -> ../nowhere 1:1", "d/p | 640", "d/c c4:300 600", "d/b b259:70000",
		}},
		{"times", layers{{"a @-62135596800", "b @4294967296.999999999", "c @253402300799"}}, []string{"a @-62135596800", "b @4294967296.999999999", "c @253402300799"}},

		// One layer: the order of the entries matters.
		{"later file", layers{{"a =1 @1", "a =22 @2"}}, []string{"a =22 @2"}},
		{"directory twice", layers{{"a/ 700 {user.x=1,user.y=1}", "a/f", "a/ 711 {user.x=2}"}}, []string{"a/ 711 {user.x=2,user.y=1}", "a/f"}},
		{"file for directory", layers{{"a/ @5", "a/b/f", "a =x @6"}}, []string{"a =x @5"}},
		{"directory for file", layers{{"a =x", "a/", "a/b"}}, []string{"a/", "a/b"}},
		{"directory and back", layers{{"a/f =1", "a", "a/", "a/g"}}, []string{"a/", "a/g"}},
		{"implicit parents", layers{{"a/b/c/f"}}, []string{"a/", "a/b/", "a/b/c/", "a/b/c/f"}},
		{"implicit parent, then its entry", layers{{"a/f", "a/ 700 @7"}}, []string{"a/ 700 @7", "a/f"}},
		{"implicit in setgid", layers{{"a/ 2755 1:7", "a/b/f"}}, []string{"a/ 2755 1:7", "a/b/ 0:7", "a/b/f"}},
		{"later time by name", layers{{"a/ @1", "x", "x =y", "a/f"}}, []string{"a/ @1", "a/f", "x =y"}},

		// Hard links.
		{"hard link", layers{{"a =x", "b == a"}}, []string{"a =x n=2", "b =x n=2 == a"}},
		{"hard link's attributes", layers{{"a =x 4755 {security.capability=CAP,user.a=1}", "d/b == a 600 1:2 @3 {user.b=2}"}},
			[]string{"a =x 600 1:2 @3 {user.a=1,user.b=2} n=2", "d/", "d/b =x 600 1:2 @3 {user.a=1,user.b=2} n=2 == a"}},
		{"hard link to what is there at that moment", layers{{"a =1", "b == a", "a =2"}}, []string{"a =2", "b =1"}},
		{"hard link to a symlink", layers{{"a -> x", "b == a"}}, []string{"a -> x n=2", "b -> x n=2 == a"}},
		{"hard link through a symlink", layers{{"d/f =x", "l -> d", "b == l/f"}}, []string{"b =x n=2", "d/", "d/f =x n=2 == b", "l -> d"}},
		{"hard link to a device", layers{{"a c1:3", "b == a"}}, []string{"a c1:3 n=2", "b c1:3 n=2 == a"}},
		{"hard link replaced", layers{{"a =1", "b == a", "b =2"}}, []string{"a =1", "b =2"}},
		{"hard link removed with its directory", layers{{"a =1", "d/b == a", "d"}}, []string{"a =1", "d"}},
		{"hard link hidden above still counts", layers{{"a =1", "b == a"}, {".wh.b"}}, []string{"a =1 n=2"}},

		// Names through symlinks: within the layer, and within the root.
		{"through symlink", layers{{"d/", "l -> d", "l/f"}}, []string{"d/", "d/f", "l -> d"}},
		{"through absolute symlink", layers{{"x/l -> /d", "x/l/f"}}, []string{"d/", "d/f", "x/", "x/l -> /d"}},
		{"through symlink above the root", layers{{"x/l -> ../../../d", "x/l/f"}}, []string{"d/", "d/f", "x/", "x/l -> ../../../d"}},
		{"through symlink to the root", layers{{"l -> /", "l/f"}}, []string{"f", "l -> /"}},
		{"through chain", layers{{"a -> b", "b -> c/d", "c/d -> ../e", "a/f"}}, []string{"a -> b", "b -> c/d", "c/", "c/d -> ../e", "e/", "e/f"}},
		{"symlink is replaced, not followed", layers{{"d/", "l -> d", "l/", "l/f"}}, []string{"d/", "l/", "l/f"}},
		{"symlink below is hidden, not followed", layers{{"d/ 700", "l -> d"}, {"l/f"}}, []string{"d/ 700", "l/ 700", "l/f"}},

		// Whiteouts.
		{"whiteout", layers{{"a =x", "d/f", "d/g"}, {".wh.a", "d/.wh.f"}}, []string{"d/ n=1", "d/g"}},
		{"whiteout of nothing", layers{{"a"}, {".wh.b", "c/.wh.d"}}, []string{"a", "c/"}},
		{"whiteout of a directory", layers{{"d/e/f"}, {".wh.d"}}, nil},
		{"whiteout in the lowest layer", layers{{".wh.a", "d/.wh.b"}}, []string{"d/"}},
		{"whiteout of a whiteout", layers{{"a"}, {".wh.a"}, {".wh.a"}, {"a =x"}}, []string{"a =x"}},
		{"whiteout of a name like one", layers{{".wh.x/f"}, {".wh..wh.x"}}, nil},
		{"whiteout and file of one layer", layers{{"a =1"}, {".wh.a", "a =2"}}, []string{"a =2"}},
		{"file and whiteout of one layer", layers{{"a =1"}, {"a =2", ".wh.a"}}, []string{"a =2"}},
		{"whiteout, then directory", layers{{"d/f"}, {".wh.d", "d/"}}, []string{"d/ n=1", "d/f"}},
		{"directory above a whiteout", layers{{"d/f"}, {".wh.d"}, {"d/", "d/g"}}, []string{"d/", "d/g"}},
		{"whiteout hides parent's attributes", layers{{"d/ 700", "d/f"}, {".wh.d"}, {"d/g"}}, []string{"d/", "d/g"}},
		{"device 0:0", layers{{"a =x", "d/f"}, {"a c0:0", "b c0:0", "d c0:0"}}, nil},
		{"block device 0:0", layers{{"a =x"}, {"a b0:0"}}, []string{"a b0:0"}},
		{"hard link to a whiteout", layers{{"a", "b"}, {".wh.a", "b == a"}}, nil},
		{"other metadata of aufs", layers{{"a"}, {".wh..wh.plnk", ".wh..wh.aufs"}}, []string{"a"}},

		// Opaque directories.
		{"opaque", layers{{"d/f", "d/e/g"}, {"d/", "d/.wh..wh..opq", "d/h"}}, []string{"d/", "d/h"}},
		{"opaque last", layers{{"d/f"}, {"d/ 711", "d/h", "d/.wh..wh..opq"}}, []string{"d/ 711", "d/h"}},
		{"opaque alone", layers{{"d/ 711", "d/f"}, {"d/.wh..wh..opq"}}, []string{"d/ 711"}},
		{"opaque, replaced", layers{{"d/f"}, {"d/.wh..wh..opq", "d", "d/"}}, []string{"d/ n=1", "d/f"}},
		{"merged above opaque", layers{{"d/a"}, {"d/b", "d/.wh..wh..opq"}, {"d/c"}}, []string{"d/ n=1", "d/b", "d/c"}},
		{"opaque root is not", layers{{"a"}, {".wh..wh..opq", "b"}}, []string{"a", "b"}},

		// Layers on top of each other.
		{"merge", layers{{"d/ 700", "d/a =1", "d/s/x"}, {"d/ 711 1:1", "d/b"}, {"d/s/y"}}, []string{"d/ 711 1:1 n=1", "d/a =1", "d/b", "d/s/ n=1", "d/s/x", "d/s/y"}},
		{"inherited attributes", layers{{"d/ 700 3:4 @5 {user.a=b}", "d/f"}, {"d/g"}}, []string{"d/ 700 3:4 @5 {user.a=b} n=1", "d/f", "d/g"}},
		{"file over directory", layers{{"d/f"}, {"d =x"}}, []string{"d =x"}},
		{"directory over file over directory", layers{{"d/f"}, {"d"}, {"d/g"}}, []string{"d/", "d/g"}},
		{"directory over file", layers{{"d"}, {"d/"}}, []string{"d/"}},
		{"symlink over directory", layers{{"d/f"}, {"d -> e"}}, []string{"d -> e"}},
		{"other names stay", layers{{"a =1", "b == a"}, {"a =2"}}, []string{"a =2", "b =1 n=2"}},

		// Extended attributes.
		{"xattrs", layers{{"f {security.capability=CAP,security.x=y,user.a=b,user.empty=}", "d/ {user.a=b}"}},
			[]string{"f {security.capability=CAP,security.x=y,user.a=b,user.empty=}", "d/ {user.a=b}"}},
		{"xattrs of links and devices", layers{{"l -> x {security.x=y,user.a=b}", "c c1:3 {security.x=y,user.a=b}"}}, []string{"l -> x {security.x=y}", "c c1:3 {security.x=y}"}},
		{"xattrs that are left out", layers{{"f {trusted.x=y,nothing=1,system.nfs4_acl=x}"}}, []string{"f"}},
		{"shared xattrs", layers{{"a =1 {user.k=v,user.one=a}", "b =2 {user.k=v}", "c {user.k=v}"}}, []string{"a =1 {user.k=v,user.one=a}", "b =2 {user.k=v}", "c {user.k=v}"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var ls []*toc.TOC
			contents := map[string]string{}
			for _, l := range tt.layers {
				ls = append(ls, layerOf(t, l...))
				for _, line := range l {
					if _, c, ok := strings.Cut(line, " ="); ok && c[0] != '=' {
						c = strings.Fields(c)[0]
						contents[redirect(toc.ObjectKey([]toc.Chunk{{Digest: sha256.Sum256([]byte(c)), Size: int64(len(c))}}))] = c
					}
				}
			}
			check(t, ls, contents, slices.Clone(tt.want))
		})
	}
}

func TestMergeErrors(t *testing.T) {
	long := strings.Repeat("x", 256)
	deep := strings.Repeat("d/", 1500)
	for _, tt := range []struct {
		name   string
		layers [][]string
		want   string
	}{
		{"dangling", [][]string{{"a == b"}}, `layer 0: "a": hard link to "b", which is not in the layer`},
		{"to a lower layer", [][]string{{"b"}, {"a == b"}}, `layer 1: "a": hard link to "b", which is not in the layer`},
		{"to itself", [][]string{{"a", "a == a"}}, `layer 0: "a": hard link to "a", which is not in the layer`},
		{"cyclic", [][]string{{"a == b", "b == a"}}, `layer 0: "a": hard link to "b", which is not in the layer`},
		{"to a directory", [][]string{{"d/", "a == d"}}, `layer 0: "a": hard link to "d", a directory`},
		{"outside", [][]string{{"a == ../b"}}, `layer 0: "a": hard link to "../b": name with an element ".."`},
		{"name outside", [][]string{{"../b"}}, `layer 0: "../b": name with an element ".."`},
		{"absolute name", [][]string{{"/b"}}, `layer 0: "/b": name with an element ""`},
		{"root is a file", [][]string{{"/ | "}}, `layer 0: "": the root is not a directory`},
		{"file as directory", [][]string{{"a", "a/b"}}, `layer 0: "a/b": "a" is not a directory`},
		{"whiteout as directory", [][]string{{".wh.a", "a/b"}}, `layer 0: "a/b": "a" is not a directory`},
		{"through what is gone", [][]string{{"a/l -> /", "a/l/a", "a/l/b"}}, `layer 0: "a/l/b": "a" is not a directory`},
		{"loop", [][]string{{"a -> b", "b -> a", "a/x"}}, `layer 0: "a/x": "b": too many symlinks`},
		{"long name through symlink", [][]string{{"l -> " + long, "l/f"}}, "is longer than 255 bytes"},
		{"long path through symlink", [][]string{{deep + "l -> " + deep, deep + "l/f"}}, "leads to a path of more than 4095 bytes"},
		{"whiteout without a name", [][]string{{"d/.wh."}}, `layer 0: "d/.wh.": not the name of a whiteout`},
		{"whiteout of ..", [][]string{{"d/.wh..."}}, `layer 0: "d/.wh...": not the name of a whiteout`},
		{"overlayfs", [][]string{{"f {trusted.overlay.redirect=/x}"}}, `layer 0: "f": xattr "trusted.overlay.redirect" would steer overlayfs`},
		{"overlayfs of users", [][]string{{"a"}, {"d/ {user.overlay.opaque=y}"}}, `layer 1: "d": xattr "user.overlay.opaque" would steer overlayfs`},
		{"xattr without a name", [][]string{{"f {user.=x}"}}, `layer 0: "f": xattr "user.": not a name`},
		{"capability", [][]string{{"f {security.capability=x}"}}, `layer 0: "f": xattr security.capability: not a capability of version 2 or 3`},
		{"acl", [][]string{{"f {system.posix_acl_access=x}"}}, `layer 0: "f": xattr system.posix_acl_access: not an ACL of version 2`},
		{"device", [][]string{{"c c4096:0"}}, `layer 0: "c": device number 4096:0 is out of range`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var ls []*toc.TOC
			for _, l := range tt.layers {
				if strings.HasPrefix(l[0], "/ ") {
					ls = append(ls, &toc.TOC{Entries: []toc.Entry{{Type: toc.FIFO}}})
					continue
				}
				ls = append(ls, layerOf(t, l...))
			}
			_, err := Merge(ls)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Merge: %v\nwant %s", err, tt.want)
			}
		})
	}
}
