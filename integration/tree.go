package integration

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// A Tree is what was seen of a directory and all below it, by path; the root is "".
type Tree map[string]Node

// A Node is everything that can be seen of one name, and is the same wherever the name is. So a directory has
// no size and no link count: these depend on the file system.
type Node struct {
	Mode   uint32 // the type and the permission bits, as stat(2) has them
	UID    uint32
	GID    uint32
	Size   int64 // of a regular file or a symlink, in bytes
	MTime  Time
	Nlink  uint64            // of what is not a directory
	First  string            // the first name, in order, of the names that share the inode, if there are several
	Rdev   uint64            // of a device
	Target string            // of a symlink
	Xattrs map[string]string // all that are listed, without overlayfs's own
	SHA256 string            // of a regular file's content, in hexadecimal digits
}

// Time is a modification time.
type Time struct{ Sec, Nsec int64 }

// String returns the seconds since 1970 with nine digits after the point.
func (t Time) String() string { return fmt.Sprintf("%d+%09dns", t.Sec, t.Nsec) }

// Snapshot reads the tree at root, content included, with all CPUs. It crosses into other mounts
// and follows no symlink. It also asks that each name of a directory comes once, and that readdir's type is stat's.
func Snapshot(root string) (Tree, error) {
	type result struct {
		name  string
		node  Node
		inode inode
		err   error
	}
	names := make(chan dirent, 256)
	results := make(chan result, 256)
	var walkErr error
	go func() {
		defer close(names)
		walkErr = walk(root, "", names)
	}()
	var readers sync.WaitGroup
	for range 2 * runtime.GOMAXPROCS(0) { // they wait for the disk as well
		readers.Go(func() {
			buf := make([]byte, 1<<20)
			for d := range names {
				n, i, err := look(root, d, buf)
				results <- result{d.name, n, i, err}
			}
		})
	}
	go func() { readers.Wait(); close(results) }()

	tree := Tree{}
	shared := map[inode][]string{}
	var errs []error
	for r := range results {
		if r.err != nil {
			errs = append(errs, r.err)
			continue
		}
		if _, twice := tree[r.name]; twice {
			errs = append(errs, fmt.Errorf("%s: readdir gives %q twice", root, r.name))
		}
		tree[r.name] = r.node
		if r.node.Mode&unix.S_IFMT != unix.S_IFDIR {
			shared[r.inode] = append(shared[r.inode], r.name)
		}
	}
	for _, list := range shared {
		if len(list) < 2 {
			continue
		}
		first := slices.Min(list)
		for _, name := range list {
			n := tree[name]
			n.First = first
			tree[name] = n
		}
	}
	return tree, errors.Join(append(errs, walkErr)...)
}

type inode struct{ dev, ino uint64 }

// A dirent is a name as readdir gives it; the root's type is that of a directory.
type dirent struct {
	name string
	typ  fs.FileMode
}

// walk sends root and every name below dir. A directory that is removed meanwhile is an error.
func walk(root, dir string, names chan<- dirent) error {
	if dir == "" {
		names <- dirent{"", fs.ModeDir}
	}
	f, err := os.Open(filepath.Join(root, dir))
	if err != nil {
		return err
	}
	list, err := f.ReadDir(-1)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	for _, e := range list {
		name := e.Name()
		if dir != "" {
			name = dir + "/" + name
		}
		names <- dirent{name, e.Type()}
		if e.IsDir() {
			if err := walk(root, name, names); err != nil {
				return err
			}
		}
	}
	return nil
}

func look(root string, d dirent, buf []byte) (n Node, i inode, err error) {
	path := filepath.Join(root, d.name)
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return n, i, &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	n = Node{Mode: st.Mode, UID: st.Uid, GID: st.Gid, MTime: Time{st.Mtim.Sec, st.Mtim.Nsec}}
	if want := typeOf(st.Mode); d.typ != want {
		return n, i, fmt.Errorf("%s: readdir says it is %v, stat %v", path, d.typ, want)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		n.Nlink = uint64(st.Nlink)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		n.Size = st.Size
		n.SHA256, err = hashFile(path, st.Size, buf)
	case unix.S_IFLNK:
		n.Size = st.Size
		n.Target, err = os.Readlink(path)
	case unix.S_IFCHR, unix.S_IFBLK:
		n.Rdev = st.Rdev
	}
	if err != nil {
		return n, i, err
	}
	n.Xattrs, err = xattrs(path)
	return n, inode{st.Dev, st.Ino}, err
}

func typeOf(mode uint32) fs.FileMode {
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return fs.ModeDir
	case unix.S_IFLNK:
		return fs.ModeSymlink
	case unix.S_IFIFO:
		return fs.ModeNamedPipe
	case unix.S_IFSOCK:
		return fs.ModeSocket
	case unix.S_IFCHR:
		return fs.ModeDevice | fs.ModeCharDevice
	case unix.S_IFBLK:
		return fs.ModeDevice
	}
	return 0
}

// hashFile reads to the end of the file, which must be where stat says it is.
func hashFile(path string, size int64, buf []byte) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	// Without the wrappers io.CopyBuffer would not use buf.
	n, err := io.CopyBuffer(struct{ io.Writer }{h}, struct{ io.Reader }{f}, buf)
	if err == nil && n != size {
		err = fmt.Errorf("%s: %d bytes can be read, stat says %d", path, n, size)
	}
	return hex.EncodeToString(h.Sum(nil)), err
}

func xattrs(path string) (map[string]string, error) {
	fail := func(err error) (map[string]string, error) {
		return nil, &fs.PathError{Op: "xattrs", Path: path, Err: err}
	}
	size, err := unix.Llistxattr(path, nil)
	if err != nil && err != unix.ENOTSUP {
		return fail(err)
	}
	if size <= 0 {
		return nil, nil
	}
	list := make([]byte, size)
	if size, err = unix.Llistxattr(path, list); err != nil {
		return fail(err)
	}
	if size == 0 {
		return nil, nil // overlayfs counts its own and does not list them
	}
	m := map[string]string{}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(list[:size]), "\x00"), "\x00") {
		if strings.HasPrefix(name, "trusted.overlay.") {
			continue
		}
		value := make([]byte, 64<<10) // XATTR_SIZE_MAX
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return fail(fmt.Errorf("%q: %w", name, err))
		}
		if _, twice := m[name]; twice {
			return fail(fmt.Errorf("%q is listed twice", name))
		}
		m[name] = string(value[:n])
	}
	if len(m) == 0 {
		return nil, nil
	}
	return m, nil
}

// A Difference is one thing that is not the same in two trees.
type Difference struct {
	Path  string
	Field string // a field of Node in lower case, or "name" if one tree does not have the path
	A, B  string // what is there, or "missing"
}

// String returns the path in quotes, the field, and what it is in either tree.
func (d Difference) String() string {
	return fmt.Sprintf("%q: %s: %s, not %s", d.Path, d.Field, d.B, d.A)
}

// Compare returns the differences between a, which is how it should be, and b, in order of paths.
func Compare(a, b Tree) []Difference {
	var list []Difference
	for path, x := range a {
		y, ok := b[path]
		if !ok {
			list = append(list, Difference{path, "name", typeName(x.Mode), "missing"})
			continue
		}
		differ := func(field, x, y string) {
			if x != y {
				list = append(list, Difference{path, field, x, y})
			}
		}
		differ("mode", fmt.Sprintf("%s %04o", typeName(x.Mode), x.Mode&0o7777), fmt.Sprintf("%s %04o", typeName(y.Mode), y.Mode&0o7777))
		differ("uid", fmt.Sprint(x.UID), fmt.Sprint(y.UID))
		differ("gid", fmt.Sprint(x.GID), fmt.Sprint(y.GID))
		differ("size", fmt.Sprint(x.Size), fmt.Sprint(y.Size))
		differ("mtime", x.MTime.String(), y.MTime.String())
		differ("nlink", fmt.Sprint(x.Nlink), fmt.Sprint(y.Nlink))
		differ("first", fmt.Sprintf("%q", x.First), fmt.Sprintf("%q", y.First))
		differ("rdev", device(x.Rdev), device(y.Rdev))
		differ("target", fmt.Sprintf("%q", x.Target), fmt.Sprintf("%q", y.Target))
		differ("sha256", x.SHA256, y.SHA256)
		if !maps.Equal(x.Xattrs, y.Xattrs) {
			differ("xattrs", printXattrs(x.Xattrs), printXattrs(y.Xattrs))
		}
	}
	for path, y := range b {
		if _, ok := a[path]; !ok {
			list = append(list, Difference{path, "name", "missing", typeName(y.Mode)})
		}
	}
	slices.SortFunc(list, func(x, y Difference) int {
		return cmp.Or(strings.Compare(x.Path, y.Path), strings.Compare(x.Field, y.Field))
	})
	return list
}

func typeName(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return "directory"
	case unix.S_IFREG:
		return "file"
	case unix.S_IFLNK:
		return "symlink"
	case unix.S_IFIFO:
		return "fifo"
	case unix.S_IFSOCK:
		return "socket"
	case unix.S_IFCHR:
		return "character device"
	case unix.S_IFBLK:
		return "block device"
	}
	return fmt.Sprintf("type %o", mode&unix.S_IFMT)
}

func device(rdev uint64) string { return fmt.Sprintf("%d:%d", unix.Major(rdev), unix.Minor(rdev)) }

func printXattrs(m map[string]string) string {
	var s []string
	for _, name := range slices.Sorted(maps.Keys(m)) {
		s = append(s, fmt.Sprintf("%q=%.200q", name, m[name]))
	}
	return "[" + strings.Join(s, " ") + "]"
}
