package upper

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"lazuli/fs/toc"
)

// The xattrs of overlayfs, for a mount without userxattr. What a container sets below overlayPrefix
// gets escapedPrefix instead.
const (
	overlayPrefix = "trusted.overlay."
	escapedPrefix = "trusted.overlay.overlay."
	userPrefix    = "user.overlay."

	metacopyName = "trusted.overlay.metacopy"
	redirectName = "trusted.overlay.redirect"
	opaqueName   = "trusted.overlay.opaque"
	whiteoutName = "trusted.overlay.whiteout"
)

// A node is one file of either tree, held open by its inode, and all that is known of it without its content.
type node struct {
	fd     int // O_PATH
	st     unix.Stat_t
	xattrs []toc.Xattr // without those of overlayfs
	target string      // of a symlink

	metacopy    bool   // the data is in a lower layer
	redirect    string // where; "" is at the same path
	opaque      bool
	whiteoutTag bool     // marked as a whiteout by an xattr
	moved       bool     // the mark of an upper directory whose files are in the store
	foreign     []string // xattrs in a namespace of overlayfs that are not the kernel's
}

func (n *node) close() {
	if n.fd >= 0 {
		unix.Close(n.fd)
		n.fd = -1
	}
}

func (n *node) typ() uint32   { return n.st.Mode & unix.S_IFMT }
func (n *node) isDir() bool   { return n.typ() == unix.S_IFDIR }
func (n *node) inode() inode  { return inode{n.st.Dev, n.st.Ino} }
func (n *node) sparse() bool  { return n.st.Blocks*512 < n.st.Size }
func (n *node) regular() bool { return n.typ() == unix.S_IFREG }

func (n *node) whiteout() bool {
	return n.typ() == unix.S_IFCHR && n.st.Rdev == 0 || n.whiteoutTag && n.regular() && n.st.Size == 0
}

type inode struct{ dev, ino uint64 }

// openAt opens what has the name below dir and stays there: no symlink is followed and no mount crossed.
func openAt(dir int, name string, flags uint64) (int, error) {
	how := unix.OpenHow{
		Flags:   flags | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	}
	for {
		fd, err := unix.Openat2(dir, name, &how)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// look opens a file and reads its metadata. The error is a bare errno if the file
// cannot be opened. A symlink is itself, also as the last element of name.
func (w *walk) look(dir int, name string) (*node, error) {
	fd, err := openAt(dir, name, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return nil, err
	}
	n := &node{fd: fd}
	if err := w.read(n); err != nil {
		n.close()
		return nil, err
	}
	return n, nil
}

func (w *walk) read(n *node) error {
	if err := unix.Fstat(n.fd, &n.st); err != nil {
		return fmt.Errorf("stat: %w", err)
	}
	if n.typ() == unix.S_IFLNK {
		target := make([]byte, unix.PathMax)
		size, err := unix.Readlinkat(n.fd, "", target)
		if err != nil {
			return fmt.Errorf("readlink: %w", err)
		}
		n.target = string(target[:size])
	}
	return w.readXattrs(n)
}

// procPath is a path that leads to the open file itself, whatever it is and wherever its name has gone.
func procPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// readXattrs goes through /proc, because fgetxattr(2) takes no O_PATH descriptor.
func (w *walk) readXattrs(n *node) error {
	path := procPath(n.fd)
	if w.xattrList == nil { // XATTR_LIST_MAX and XATTR_SIZE_MAX
		w.xattrList, w.xattrValue = make([]byte, 64<<10), make([]byte, 64<<10)
	}
	size, err := unix.Listxattr(path, w.xattrList)
	if err != nil && err != unix.ENOTSUP {
		return fmt.Errorf("list of xattrs: %w", err)
	}
	if size <= 0 {
		return nil
	}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(w.xattrList[:size]), "\x00"), "\x00") {
		size, err := unix.Getxattr(path, name, w.xattrValue)
		if err == unix.ENODATA { // removed meanwhile
			continue
		}
		if err != nil {
			return fmt.Errorf("xattr %q: %w", name, err)
		}
		n.add(name, string(w.xattrValue[:size]))
	}
	slices.SortFunc(n.xattrs, func(a, b toc.Xattr) int { return cmp.Compare(a.Name, b.Name) })
	return nil
}

// add sorts an xattr: the file's own, or overlayfs's.
func (n *node) add(name, value string) {
	switch {
	case name == metacopyName:
		n.metacopy = true
	case name == redirectName:
		n.redirect = value
	case name == opaqueName:
		n.opaque = value == "y" // "x" says that there are whiteouts with whiteoutName inside
	case name == whiteoutName:
		n.whiteoutTag = true
	case name == moved:
		n.moved = true
	case strings.HasPrefix(name, escapedPrefix), strings.HasPrefix(name, userPrefix):
		n.foreign = append(n.foreign, name)
	case strings.HasPrefix(name, overlayPrefix):
	default:
		n.xattrs = append(n.xattrs, toc.Xattr{Name: name, Value: value})
	}
}

// names returns what is in the directory, sorted.
func (n *node) names() ([]string, error) {
	fd, err := openAt(n.fd, ".", unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	f := os.NewFile(uintptr(fd), "directory")
	names, err := f.Readdirnames(-1)
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	slices.Sort(names)
	return names, nil
}

// redirected returns the path in the lower tree that a redirect leads to, for a file in directory dir of the lower
// tree. The kernel writes the name that a file in the same directory had, or the path from the root of the layer.
func redirected(dir place, redirect string) (place, error) {
	bad := fmt.Errorf("%s is %.300q, which the kernel does not write: is the upper directory from another machine?", redirectName, redirect)
	rest, absolute := strings.CutPrefix(redirect, "/")
	for elem := range strings.SplitSeq(rest, "/") {
		if elem == "" || elem == "." || elem == ".." {
			return place{}, bad
		}
	}
	switch {
	case absolute:
		return place{rest, true}, nil
	case strings.Contains(redirect, "/"):
		return place{}, bad
	}
	return dir.child(redirect), nil
}

// objectKey returns the key of the object that a redirect into the store names, "/a/bcdef…".
func objectKey(redirect string) (toc.Digest, bool) {
	if len(redirect) != len("/a/")+63 || redirect[0] != '/' || redirect[2] != '/' {
		return toc.Digest{}, false
	}
	key, err := toc.ParseDigest("sha256:" + redirect[1:2] + redirect[3:])
	return key, err == nil
}

// A place is a path in the lower tree, "" its root, or nowhere: the zero value.
type place struct {
	path string
	ok   bool
}

func (p place) child(name string) place {
	if !p.ok {
		return p
	}
	return place{join(p.path, name), true}
}

func join(dir, name string) string {
	if dir == "" {
		return name
	}
	return dir + "/" + name
}
