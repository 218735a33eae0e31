package meta

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"

	"lazuli/fs/toc"
)

const (
	capability = "security.capability"
	aclAccess  = "system.posix_acl_access"
	aclDefault = "system.posix_acl_default"

	// maxXattr is the size of a value, in bytes: EROFS has 16 bits for it. (Linux
	// itself takes one more, 65536.)
	maxXattr = 1<<16 - 1
	// maxXattrs is the size of all of an inode's own xattrs in the image, in bytes:
	// kernels before 6.6 keep it in 16 bits.
	maxXattrs = 1<<16 - 1
)

// namespaces are the prefixes that EROFS has a number for (EROFS_XATTR_INDEX_*).
// ACLs are whole names.
var namespaces = []struct {
	prefix string
	index  byte
}{
	{"user.", 1},
	{aclAccess, 2},
	{aclDefault, 3},
	{"trusted.", 4},
	{"security.", 6},
}

// namespace returns the number of name's prefix, and what follows the prefix.
func namespace(name string) (index byte, rest string, ok bool) {
	for _, n := range namespaces {
		if rest, ok := strings.CutPrefix(name, n.prefix); ok {
			return n.index, rest, (rest == "") == (n.index == 2 || n.index == 3)
		}
	}
	return 0, "", false
}

// xattrs returns those of a file of type typ that had old when it got the attributes of e.
//
// As with containerd, whose unpacker asks the kernel: "trusted." and unknown namespaces
// are left out, and so is what only other types can have. What the kernel or EROFS
// would refuse is an error.
func (m *merger) xattrs(old []toc.Xattr, e *toc.Entry, typ toc.Type) ([]toc.Xattr, error) {
	if len(e.Xattrs) == 0 && len(old) == 0 {
		return nil, nil
	}
	all := slices.Clone(old)
	for _, x := range e.Xattrs {
		switch {
		case strings.HasPrefix(x.Name, "trusted.overlay."), strings.HasPrefix(x.Name, "user.overlay."):
			return nil, fmt.Errorf("xattr %.80q would steer overlayfs", x.Name)
		case strings.HasPrefix(x.Name, "user."):
			if typ != toc.Regular && typ != toc.Directory {
				continue
			}
		case x.Name == capability:
			if !isCapability(x.Value) {
				return nil, fmt.Errorf("xattr %s: not a capability of version 2 or 3", x.Name)
			}
		case strings.HasPrefix(x.Name, "security."):
		case x.Name == aclAccess, x.Name == aclDefault:
			if typ == toc.Symlink {
				continue
			}
			if err := checkACL(x.Value); err != nil {
				return nil, fmt.Errorf("xattr %s: %w", x.Name, err)
			}
			if x.Name == aclDefault && typ != toc.Directory {
				return nil, fmt.Errorf("xattr %s, but the file is not a directory", x.Name)
			}
		default:
			continue
		}
		if _, _, ok := namespace(x.Name); !ok || len(x.Name) > maxName || strings.IndexByte(x.Name, 0) >= 0 {
			return nil, fmt.Errorf("xattr %.300q: not a name", x.Name)
		}
		if len(x.Value) > maxXattr {
			return nil, fmt.Errorf("xattr %s of %d bytes: at most %d", x.Name, len(x.Value), maxXattr)
		}
		if i := slices.IndexFunc(all, func(y toc.Xattr) bool { return x.Name == y.Name }); i >= 0 {
			all[i] = x
		} else {
			all = append(all, x)
		}
	}
	// The unpacker sets the mode last, and chmod changes the ACL.
	all = slices.DeleteFunc(all, func(x toc.Xattr) bool {
		return x.Name == aclAccess && !hasMask(x.Value) || x.Name == aclDefault && len(x.Value) == aclHeader
	})
	for i, x := range all {
		if x.Name == aclAccess {
			all[i].Value = chmodACL(x.Value, e.Mode)
		}
		m.shared.count[all[i]]++
	}
	return all, nil
}

// isCapability reports whether setxattr takes v (security/commoncap.c).
func isCapability(v string) bool {
	return len(v) == 20 && v[3] == 2 || len(v) == 24 && v[3] == 3
}

// An ACL is a header with the version and 8 bytes for each entry
// (include/uapi/linux/posix_acl_xattr.h, posix_acl.h).
const (
	aclHeader = 4
	aclEntry  = 8

	aclUserObj  = 0x01
	aclUser     = 0x02
	aclGroupObj = 0x04
	aclGroup    = 0x08
	aclMask     = 0x10
	aclOther    = 0x20
)

// checkACL reports what posix_acl_valid in fs/posix_acl.c would refuse.
func checkACL(v string) error {
	b := []byte(v)
	if len(b) < aclHeader || binary.LittleEndian.Uint32(b) != 2 || (len(b)-aclHeader)%aclEntry != 0 {
		return fmt.Errorf("not an ACL of version 2")
	}
	var seen, last uint16
	for b = b[aclHeader:]; len(b) > 0; b = b[aclEntry:] {
		tag, perm := binary.LittleEndian.Uint16(b), binary.LittleEndian.Uint16(b[2:])
		named := tag == aclUser || tag == aclGroup
		switch {
		case tag&^0x3f != 0 || tag&(tag-1) != 0 || tag == 0, perm > 7:
			return fmt.Errorf("ACL with an entry of tag %#x, permissions %#o", tag, perm)
		case tag < last, tag == last && !named:
			return fmt.Errorf("ACL with entries out of order")
		}
		seen, last = seen|tag, tag
	}
	const base = aclUserObj | aclGroupObj | aclOther
	if seen != 0 && (seen&base != base || seen&(aclUser|aclGroup) != 0 && seen&aclMask == 0) {
		return fmt.Errorf("ACL with entries missing")
	}
	return nil
}

// hasMask reports whether an ACL says more than a mode can.
func hasMask(v string) bool {
	for ; len(v) >= aclHeader+aclEntry; v = v[aclEntry:] {
		if v[aclHeader] == aclMask {
			return true
		}
	}
	return false
}

// chmodACL returns the ACL v, which has a mask, after a chmod.
func chmodACL(v string, mode uint32) string {
	b := []byte(v)
	for i := aclHeader; i < len(b); i += aclEntry {
		switch b[i] {
		case aclUserObj:
			b[i+2] = byte(mode >> 6 & 7)
		case aclMask:
			b[i+2] = byte(mode >> 3 & 7)
		case aclOther:
			b[i+2] = byte(mode & 7)
		}
	}
	return string(b)
}
