package meta

import (
	"fmt"
	"hash/maphash"
	"path"
	"slices"
	"strings"

	"lazuli/fs/toc"
)

const (
	whiteoutPrefix = ".wh."
	opaqueMarker   = ".wh..wh..opq"

	maxName = 255  // bytes of one element of a path, NAME_MAX
	maxPath = 4095 // bytes of a path, PATH_MAX without its NUL

	// maxLinks is how many symlinks one name may lead through, and maxLinksAll how
	// many all names of an image may, so that short names cannot cost long walks.
	maxLinks    = 255
	maxLinksAll = 1 << 20
)

// An inode is one file. Inode 0 is none.
type inode struct {
	// attr has the owner, the mode and the modification time: those of the last
	// entry that named the file, which need not be the one that made it.
	attr *toc.Entry
	// xattrs are what the file shows, without those of the format.
	xattrs []toc.Xattr
	// layer and entry say which entry made the file; entry is -1 for a directory
	// that no entry names.
	layer, entry int32
	// links counts the names that the file's own layer has for it.
	links int32
	// first is the head of a directory's list of names in its layer.
	first int32
	// below is the directory that this one is merged with, in a lower layer.
	below int32
	// from and to are where in Tree.kids the names are that the directory shows.
	from, to int32
	// pathLen is the length of a directory's path, in bytes.
	pathLen uint16
	typ     toc.Type
	// opaque marks a directory that hides those below, merged one that does not.
	opaque, merged bool

	place place
}

// A dentry is a name in a directory. Dentry 0 is none. Those of higher layers
// have higher numbers.
type dentry struct {
	name  string
	hash  uint32
	dir   int32 // the directory that has the name
	inode int32
	next  int32 // of the same directory
}

// whiteout is the type of a name that hides those below: a character device 0:0,
// wherever it comes from.
const whiteout toc.Type = 0xff

// A Tree is what the layers of an image show together. It is immutable, and
// refers to the TOCs that it was made from.
type Tree struct {
	layers   []*toc.TOC
	inodes   []inode
	dentries []dentry
	// kids holds the names that each directory shows, sorted, with "." and "..".
	kids []int32
	root int32
	// order holds the inodes in the order in which the image has them.
	order []int32
	// keys are the objects that the regular files refer to.
	keys   []toc.Digest
	shared shared
	stats  Stats
	// metaEnd is where the image's inodes end and dataBlocks how many blocks of
	// directories and symlinks it has.
	metaEnd, dataBlocks int64
}

// merger makes a Tree: first every layer by itself, as an unpacker would, each into a
// tree of its own, then the names that are left when they lie on top of each other.
type merger struct {
	*Tree
	seed  maphash.Seed
	table []int32 // of dentries, open addressing; a power of two
	roots []int32 // of the layers done, and of the one at work
	links int     // symlinks followed so far

	// lastDir is the inode of lastName, the directory of the last entry:
	// in most tars the next entry has the same. 0 if it is not known.
	lastName string
	lastDir  int32
	// replaced says that a file of the layer at work took the place of another.
	replaced bool
}

// Merge returns the tree that the layers show together, the lowest first. Errors are a [LayerError] and name
// the entry: a name that is not in the form of [toc.Entry.Name] or leads through a file or a loop of
// symlinks; a hard link without a target; an xattr that steers overlayfs; chunks that are not the file;
// and what EROFS or Linux cannot hold, such as xattrs above 64 KiB or files above 16 TiB.
func Merge(layers []*toc.TOC) (*Tree, error) {
	n := 0
	for i, l := range layers {
		n += len(l.Entries)
		if n > toc.MaxEntries {
			return nil, &LayerError{i, fmt.Errorf("image has more than %d entries", toc.MaxEntries)}
		}
	}
	if len(layers) == 0 {
		return nil, fmt.Errorf("image has no layers")
	}
	size := 64
	for size < n*2 {
		size *= 2
	}
	m := &merger{
		Tree: &Tree{
			layers:   layers,
			inodes:   make([]inode, 1, n+n/8+64),
			dentries: make([]dentry, 1, n+n/4+64),
		},
		seed:  maphash.MakeSeed(),
		table: make([]int32, size),
	}
	m.shared.count = make(map[toc.Xattr]int)
	for i, l := range layers {
		if err := m.layer(i, l); err != nil {
			return nil, &LayerError{i, err}
		}
	}
	m.table = nil
	if err := m.Tree.lay(m.roots); err != nil {
		return nil, err
	}
	return m.Tree, nil
}

// rootAttr are the attributes of a root that no entry describes.
var rootAttr = toc.Entry{Type: toc.Directory, Mode: 0o755}

// layer makes the tree of one layer.
func (m *merger) layer(i int, l *toc.TOC) error {
	root := m.newInode(inode{attr: &rootAttr, entry: -1, layer: int32(i), typ: toc.Directory})
	m.roots = append(m.roots, root)
	m.lastDir, m.lastName, m.replaced = 0, "", false
	for j := range l.Entries {
		e := &l.Entries[j]
		if err := m.add(i, j, e); err != nil {
			return fmt.Errorf("%q: %w", e.Name, err)
		}
	}
	if !m.replaced {
		return nil
	}
	// An unpacker sets the times of directories when everything is in place, by
	// name: what took a directory's place gets them too.
	for j := range l.Entries {
		e := &l.Entries[j]
		if e.Type != toc.Directory || strings.HasPrefix(base(e.Name), whiteoutPrefix) {
			continue
		}
		n, err := m.find(root, e.Name)
		if err != nil {
			return fmt.Errorf("%q: %w", e.Name, err)
		}
		if n == 0 {
			continue
		}
		if in := &m.inodes[n]; in.attr.MTime != e.MTime || in.attr.MTimeNsec != e.MTimeNsec {
			a := *in.attr
			a.MTime, a.MTimeNsec = e.MTime, e.MTimeNsec
			in.attr = &a
		}
	}
	return nil
}

// add applies entry j of layer i.
func (m *merger) add(i, j int, e *toc.Entry) error {
	root := m.roots[i]
	if err := checkName(e.Name); err != nil {
		return err
	}
	if e.MTimeNsec >= 1e9 {
		return fmt.Errorf("modification time with %d nanoseconds", e.MTimeNsec)
	}
	if e.Name == "" {
		if e.Type != toc.Directory {
			return fmt.Errorf("the root is not a directory")
		}
		xattrs, err := m.xattrs(nil, e, toc.Directory)
		if err != nil {
			return err
		}
		in := &m.inodes[root]
		in.attr, in.xattrs, in.entry = e, xattrs, int32(j)
		return nil
	}

	dirName, name := split(e.Name)
	dir := m.lastDir
	if dir == 0 || dirName != m.lastName {
		var err error
		if dir, err = m.parent(i, dirName); err != nil {
			return err
		}
		m.lastDir, m.lastName = dir, dirName
	}

	if strings.HasPrefix(name, whiteoutPrefix) {
		if name == opaqueMarker {
			m.inodes[dir].opaque = true
			return nil
		}
		name = name[len(whiteoutPrefix):]
		if name == "" || name == "." || name == ".." {
			return fmt.Errorf("not the name of a whiteout")
		}
		// A whiteout hides what lies below. What the layer itself has of that
		// name stays, whichever of the two comes first.
		if m.lookup(dir, name) != 0 {
			return nil
		}
		w := m.newInode(inode{attr: e, layer: int32(i), entry: int32(j), typ: whiteout})
		return m.link(dir, name, w)
	}

	d := m.lookup(dir, name)
	if d != 0 {
		n := m.dentries[d].inode
		if e.Type == toc.Directory && m.inodes[n].typ == toc.Directory {
			xattrs, err := m.xattrs(m.inodes[n].xattrs, e, toc.Directory)
			if err != nil {
				return err
			}
			in := &m.inodes[n]
			in.attr, in.xattrs, in.entry = e, xattrs, int32(j)
			return nil
		}
		m.unlink(d)
	}

	if e.Type == toc.Hardlink {
		return m.hardlink(dir, name, root, e)
	}
	in := inode{attr: e, layer: int32(i), entry: int32(j), typ: e.Type}
	switch e.Type {
	case toc.Regular:
		if err := m.checkContent(i, e); err != nil {
			return err
		}
	case toc.Directory, toc.FIFO:
	case toc.Symlink:
		if e.Link == "" || len(e.Link) > maxPath || strings.IndexByte(e.Link, 0) >= 0 {
			return fmt.Errorf("symlink to %.80q", e.Link)
		}
	case toc.CharDevice, toc.BlockDevice:
		if e.Major >= 1<<12 || e.Minor >= 1<<20 {
			return fmt.Errorf("device number %d:%d is out of range", e.Major, e.Minor)
		}
		if e.Type == toc.CharDevice && e.Major == 0 && e.Minor == 0 {
			in.typ = whiteout
		}
	default:
		return fmt.Errorf("unknown type %d", e.Type)
	}
	var err error
	if in.xattrs, err = m.xattrs(nil, e, in.typ); err != nil {
		return err
	}
	return m.link(dir, name, m.newInode(in))
}

// hardlink gives the name to the file that e links to, and the file e's attributes.
func (m *merger) hardlink(dir int32, name string, root int32, e *toc.Entry) error {
	if err := checkName(e.Link); err != nil {
		return fmt.Errorf("hard link to %.80q: %w", e.Link, err)
	}
	dirName, base := split(e.Link)
	var target int32
	if e.Link != "" {
		at, err := m.find(root, dirName)
		if err != nil {
			return fmt.Errorf("hard link to %q: %w", e.Link, err)
		}
		if at != 0 && m.inodes[at].typ == toc.Directory {
			target = m.lookup(at, base)
		}
	}
	if target == 0 {
		return fmt.Errorf("hard link to %q, which is not in the layer", e.Link)
	}
	n := m.dentries[target].inode
	in := &m.inodes[n]
	if in.typ == toc.Directory {
		return fmt.Errorf("hard link to %q, a directory", e.Link)
	}
	// chown takes a file's capabilities away; only the xattrs of the link
	// itself can bring them back.
	old := slices.DeleteFunc(slices.Clone(in.xattrs), func(x toc.Xattr) bool {
		return x.Name == capability
	})
	xattrs, err := m.xattrs(old, e, in.typ)
	if err != nil {
		return err
	}
	in.attr, in.xattrs = e, xattrs
	return m.link(dir, name, n)
}

// parent returns the directory of that name in layer i. Directories that are missing
// are made, with the attributes that the highest layer below has for them.
func (m *merger) parent(i int, name string) (int32, error) {
	links := 0
restart:
	dir := m.roots[i]
	for at := 0; at < len(name); {
		end := at + elem(name[at:])
		d := m.lookup(dir, name[at:end])
		if d == 0 {
			n := m.newInode(m.implicit(i, dir, name[:end]))
			if err := m.link(dir, name[at:end], n); err != nil {
				return 0, err
			}
			dir = n
		} else {
			n := m.dentries[d].inode
			switch m.inodes[n].typ {
			case toc.Directory:
				dir = n
			case toc.Symlink:
				var err error
				if name, err = m.follow(name, at, end, n, &links); err != nil {
					return 0, err
				}
				goto restart
			default:
				return 0, fmt.Errorf("%q is not a directory", name[:end])
			}
		}
		at = end + 1
	}
	return dir, nil
}

// implicit returns a directory of layer i that has no entry (yet).
func (m *merger) implicit(i int, parent int32, name string) inode {
	in := inode{layer: int32(i), entry: -1, typ: toc.Directory}
	for j := i - 1; j >= 0; j-- {
		n, err := m.find(m.roots[j], name)
		if err == nil && n == 0 {
			continue
		}
		if err != nil || m.inodes[n].typ != toc.Directory {
			break
		}
		in.attr, in.xattrs = m.inodes[n].attr, m.inodes[n].xattrs
		return in
	}
	in.attr = &rootAttr
	if p := m.inodes[parent].attr; p.Mode&0o2000 != 0 {
		// mkdir in a setgid directory inherits its group.
		in.attr = &toc.Entry{Type: toc.Directory, Mode: 0o755, GID: p.GID}
	}
	return in
}

// find returns what has that name in the layer with that root, symlinks followed, or 0.
func (m *merger) find(root int32, name string) (int32, error) {
	links := 0
restart:
	n := root
	for at := 0; at < len(name); {
		end := at + elem(name[at:])
		if m.inodes[n].typ != toc.Directory {
			return 0, fmt.Errorf("%q is not a directory", name[:at-1])
		}
		d := m.lookup(n, name[at:end])
		if d == 0 {
			return 0, nil
		}
		n = m.dentries[d].inode
		if m.inodes[n].typ == toc.Symlink {
			var err error
			if name, err = m.follow(name, at, end, n, &links); err != nil {
				return 0, err
			}
			goto restart
		}
		at = end + 1
	}
	return n, nil
}

// follow returns name with the symlink at name[at:end], which is inode n, replaced by its target.
// The root is the root of the layer, and ".." in it is the root.
func (m *merger) follow(name string, at, end int, n int32, links *int) (string, error) {
	*links++
	m.links++
	if *links > maxLinks {
		return "", fmt.Errorf("%q: too many symlinks", name)
	}
	if m.links > maxLinksAll {
		return "", fmt.Errorf("%q: the image's names lead through more than %d symlinks", name, maxLinksAll)
	}
	target := m.entry(n).Link
	if target[0] != '/' {
		target = name[:at] + target
	}
	target = path.Clean("/" + target + name[end:])[1:]
	if len(target) > maxPath {
		return "", fmt.Errorf("%q: leads to a path of more than %d bytes", name, maxPath)
	}
	return target, nil
}

func (m *merger) newInode(in inode) int32 {
	m.inodes = append(m.inodes, in)
	return int32(len(m.inodes) - 1)
}

func (m *merger) hash(dir int32, name string) uint32 {
	return uint32(maphash.String(m.seed, name)) ^ uint32(dir)*0x9e3779b1
}

// lookup returns the dentry of that name in dir, or 0.
func (m *merger) lookup(dir int32, name string) int32 {
	h := m.hash(dir, name)
	mask := uint32(len(m.table) - 1)
	for i := h & mask; ; i = (i + 1) & mask {
		d := m.table[i]
		if d == 0 {
			return 0
		}
		if e := &m.dentries[d]; e.hash == h && e.dir == dir && e.name == name {
			if e.inode == 0 {
				return 0 // unlinked
			}
			return d
		}
	}
}

// link adds a name for inode n to dir, which has none of that name.
func (m *merger) link(dir int32, name string, n int32) error {
	if len(name) > maxName {
		return fmt.Errorf("%.80q… is longer than %d bytes", name, maxName)
	}
	length := int(m.inodes[dir].pathLen) + 1 + len(name)
	if length > maxPath+1 {
		return fmt.Errorf("path of more than %d bytes", maxPath)
	}
	if len(m.dentries) > toc.MaxEntries {
		return fmt.Errorf("image has more than %d names", toc.MaxEntries)
	}
	if len(m.dentries)*4 > len(m.table)*3 {
		m.grow()
	}
	in := &m.inodes[n]
	in.pathLen = uint16(length)
	in.links++

	h := m.hash(dir, name)
	mask := uint32(len(m.table) - 1)
	i := h & mask
	for ; m.table[i] != 0; i = (i + 1) & mask {
		if e := &m.dentries[m.table[i]]; e.hash == h && e.dir == dir && e.name == name {
			e.inode = n // it was unlinked, and is still in the directory's list
			return nil
		}
	}
	m.table[i] = int32(len(m.dentries))
	m.dentries = append(m.dentries, dentry{name: name, hash: h, dir: dir, inode: n, next: m.inodes[dir].first})
	m.inodes[dir].first = m.table[i]
	return nil
}

func (m *merger) grow() {
	m.table = make([]int32, 2*len(m.table))
	mask := uint32(len(m.table) - 1)
	for d := 1; d < len(m.dentries); d++ {
		i := m.dentries[d].hash & mask
		for m.table[i] != 0 {
			i = (i + 1) & mask
		}
		m.table[i] = int32(d)
	}
}

// unlink takes a name away, and with a directory everything in it.
func (m *merger) unlink(d int32) {
	m.replaced, m.lastDir = true, 0
	n := m.dentries[d].inode
	m.dentries[d].inode = 0
	in := &m.inodes[n]
	in.links--
	if in.typ != toc.Directory {
		return
	}
	for k := in.first; k != 0; k = m.dentries[k].next {
		if m.dentries[k].inode != 0 {
			m.unlink(k)
		}
	}
}

// merge fills kids with the names that directory n shows, together with the
// directories below that it is merged with.
func (t *Tree) merge(n, parent int32) {
	from := len(t.kids)
	for dir := n; dir != 0; dir = t.inodes[dir].below {
		for d := t.inodes[dir].first; d != 0; d = t.dentries[d].next {
			if t.dentries[d].inode != 0 {
				t.kids = append(t.kids, d)
			}
		}
	}
	self := int32(len(t.dentries))
	t.dentries = append(t.dentries, dentry{name: ".", inode: n}, dentry{name: "..", inode: parent})
	t.kids = append(t.kids, self, self+1)
	all := t.kids[from:]
	slices.SortFunc(all, func(a, b int32) int {
		if c := strings.Compare(t.dentries[a].name, t.dentries[b].name); c != 0 {
			return c
		}
		return int(b) - int(a) // the higher layer first
	})
	kept := all[:0]
	for i := 0; i < len(all); {
		name := t.dentries[all[i]].name
		top := t.dentries[all[i]].inode
		end := i + 1
		for end < len(all) && t.dentries[all[end]].name == name {
			end++
		}
		if t.inodes[top].typ != whiteout {
			kept = append(kept, all[i])
		}
		for last := top; i+1 < end && t.inodes[last].typ == toc.Directory && !t.inodes[last].opaque; i++ {
			next := t.dentries[all[i+1]].inode
			if t.inodes[next].typ != toc.Directory {
				break
			}
			t.inodes[last].below = next
			t.inodes[top].merged = true
			last = next
		}
		i = end
	}
	t.kids = t.kids[:from+len(kept)]
	t.inodes[n].from, t.inodes[n].to = int32(from), int32(len(t.kids))
}

// entry returns the entry that made inode n, which is no implicit directory.
func (t *Tree) entry(n int32) *toc.Entry {
	in := &t.inodes[n]
	return &t.layers[in.layer].Entries[in.entry]
}

// checkName returns an error if name is not in the form of [toc.Entry.Name].
func checkName(name string) error {
	if len(name) > maxPath {
		return fmt.Errorf("name of more than %d bytes", maxPath)
	}
	if strings.IndexByte(name, 0) >= 0 {
		return fmt.Errorf("name with a NUL")
	}
	if name == "" {
		return nil
	}
	for at := 0; at <= len(name); {
		n := elem(name[at:])
		switch e := name[at : at+n]; {
		case n == 0, e == ".", e == "..":
			return fmt.Errorf("name with an element %q", e)
		case n > maxName:
			return fmt.Errorf("name with an element of more than %d bytes", maxName)
		}
		at += n + 1
	}
	return nil
}

// elem returns the length of the first element of name.
func elem(name string) int {
	if i := strings.IndexByte(name, '/'); i >= 0 {
		return i
	}
	return len(name)
}

// split returns the directory and the last element of name.
func split(name string) (dir, base string) {
	i := strings.LastIndexByte(name, '/')
	return name[:max(i, 0)], name[i+1:]
}

func base(name string) string {
	_, b := split(name)
	return b
}
