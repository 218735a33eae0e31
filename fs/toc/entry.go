package toc

import (
	"archive/tar"
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
)

// paxXattr begins the PAX records that hold extended attributes.
const paxXattr = "SCHILY.xattr."

// Linux splits a device number into 12 and 20 bits (include/linux/kdev_t.h).
const (
	maxMajor = 1<<12 - 1
	maxMinor = 1<<20 - 1
)

// Times that RFC 3339 can express: years 0 to 9999.
const (
	minTime = -62167219200
	maxTime = 253402300799
)

// EntryFromHeader returns the entry that a tar header describes, without its
// chunks. The names are cleaned: "./a", "/a", "a/" and "b//a" become "a", "a", "a" and "b/a", "./"
// becomes "", the root. It is an error, which names the entry, if the header does not
// describe a file that [Entry] can hold: a name with "..", an owner above 4294967294, an unknown type.
//
// A global PAX header (tar.TypeXGlobalHeader) makes no file and is such an
// error; callers skip it. Sparse files are Regular with their logical size.
func EntryFromHeader(h *tar.Header) (Entry, error) {
	e, err := entryFromHeader(h)
	if err != nil {
		return Entry{}, fmt.Errorf("entry %.300q: %w", h.Name, err)
	}
	return e, nil
}

func entryFromHeader(h *tar.Header) (e Entry, err error) {
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		e.Type = Regular
	case '\x00': // before POSIX: a trailing slash is what makes a directory
		e.Type = Regular
		if strings.HasSuffix(h.Name, "/") {
			e.Type = Directory
		}
	case tar.TypeLink:
		e.Type = Hardlink
	case tar.TypeSymlink:
		e.Type = Symlink
	case tar.TypeChar:
		e.Type = CharDevice
	case tar.TypeBlock:
		e.Type = BlockDevice
	case tar.TypeDir:
		e.Type = Directory
	case tar.TypeFifo:
		e.Type = FIFO
	default:
		return e, fmt.Errorf("tar type %q makes no file", h.Typeflag)
	}
	e.Name, e.Link = h.Name, h.Linkname
	if e.Type == Regular {
		e.Size = h.Size
	}
	if !h.ModTime.IsZero() { // some writers put the zero time for "none"
		e.MTime, e.MTimeNsec = h.ModTime.Unix(), uint32(h.ModTime.Nanosecond())
	}
	e.Mode = uint32(h.Mode & 0o7777)
	if e.UID, err = owner("uid", int64(h.Uid)); err != nil {
		return e, err
	}
	if e.GID, err = owner("gid", int64(h.Gid)); err != nil {
		return e, err
	}
	if e.Type == CharDevice || e.Type == BlockDevice {
		if e.Major, e.Minor, err = device(h.Devmajor, h.Devminor); err != nil {
			return e, err
		}
	}
	for k, v := range h.PAXRecords {
		if name, ok := strings.CutPrefix(k, paxXattr); ok {
			e.Xattrs = append(e.Xattrs, Xattr{name, v})
		}
	}
	return e, e.normalize()
}

// owner checks a uid or gid. The largest 32-bit number is none: chown(2) takes it for "as it is".
func owner(what string, id int64) (uint32, error) {
	if id < 0 || id >= math.MaxUint32 {
		return 0, fmt.Errorf("%s %d: out of range", what, id)
	}
	return uint32(id), nil
}

func device(major, minor int64) (uint32, uint32, error) {
	if major < 0 || major > maxMajor || minor < 0 || minor > maxMinor {
		return 0, 0, fmt.Errorf("device %d:%d: out of range", major, minor)
	}
	return uint32(major), uint32(minor), nil
}

// normalize brings names and xattrs into the form that Entry documents and
// checks all that does not depend on chunks. Every way into an Entry ends here.
func (e *Entry) normalize() (err error) {
	if e.Name == "" {
		return errors.New("empty name")
	}
	if e.Name, err = cleanName(e.Name); err != nil {
		return fmt.Errorf("name: %w", err)
	}
	if e.Name == "" && e.Type != Directory {
		return errors.New("the root is not a directory")
	}
	switch e.Type {
	case Hardlink:
		link, err := cleanName(e.Link)
		if err != nil {
			return fmt.Errorf("hard link to %.300q: %w", e.Link, err)
		}
		e.Link = link
		if e.Link == "" {
			return errors.New("hard link to the root")
		}
	case Symlink:
		if len(e.Link) == 0 || len(e.Link) > maxName {
			return fmt.Errorf("symlink to %d bytes: want 1 to %d", len(e.Link), maxName)
		}
		if strings.IndexByte(e.Link, 0) >= 0 {
			return errors.New("symlink: NUL in target")
		}
	default:
		e.Link = ""
	}
	if e.Size < 0 {
		return fmt.Errorf("size %d", e.Size)
	}
	if e.MTime < minTime || e.MTime > maxTime {
		return fmt.Errorf("mtime %d: not in the years 0 to 9999", e.MTime)
	}
	return e.normalizeXattrs()
}

func (e *Entry) normalizeXattrs() error {
	if len(e.Xattrs) == 0 {
		e.Xattrs = nil
		return nil
	}
	slices.SortFunc(e.Xattrs, func(a, b Xattr) int { return cmp.Compare(a.Name, b.Name) })
	sum := 0
	for i, x := range e.Xattrs {
		switch {
		case x.Name == "" || len(x.Name) > maxElement || strings.IndexByte(x.Name, 0) >= 0:
			return fmt.Errorf("xattr %.300q: want a name of 1 to %d bytes without NUL", x.Name, maxElement)
		case i > 0 && e.Xattrs[i-1].Name == x.Name:
			return fmt.Errorf("xattr %q: given twice", x.Name)
		case strings.HasPrefix(x.Name, "trusted.overlay."), strings.HasPrefix(x.Name, "user.overlay."):
			// overlayfs would follow it into the objects of other images.
			return fmt.Errorf("xattr %q: overlayfs's own, not for images", x.Name)
		}
		if sum += len(x.Name) + len(x.Value); sum > MaxXattrs {
			return fmt.Errorf("xattr %q: more than %d bytes of xattrs", x.Name, MaxXattrs)
		}
	}
	return nil
}

// Linux's PATH_MAX counts the terminating NUL, NAME_MAX and XATTR_NAME_MAX do not.
const (
	maxName    = 4096 - 1
	maxElement = 255
)

// cleanName returns name in the form of [Entry.Name]. Names that are in that
// form already, nearly all of them, are returned without a copy.
func cleanName(name string) (string, error) {
	clean, start := true, 0
	for i := 0; i <= len(name); i++ {
		if i < len(name) && name[i] != '/' {
			if name[i] == 0 {
				return "", errors.New("NUL")
			}
			continue
		}
		switch elem := name[start:i]; {
		case elem == "..":
			return "", errors.New(`".." in it`)
		case elem == "" || elem == ".":
			clean = clean && len(name) == 0
		case len(elem) > maxElement:
			return "", fmt.Errorf("an element of %d bytes, at most %d are possible", len(elem), maxElement)
		}
		start = i + 1
	}
	if !clean {
		var b strings.Builder
		for elem := range strings.SplitSeq(name, "/") {
			if elem == "" || elem == "." {
				continue
			}
			if b.Len() > 0 {
				b.WriteByte('/')
			}
			b.WriteString(elem)
		}
		name = b.String()
	}
	if len(name) > maxName {
		return "", fmt.Errorf("%d bytes, at most %d are possible", len(name), maxName)
	}
	return name, nil
}
