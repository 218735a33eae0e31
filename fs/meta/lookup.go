package meta

import (
	"path"
	"sort"

	"lazuli/fs/toc"
)

// A File is what a tree has under a name.
type File struct {
	Name string // from the root, without a leading slash and without symlinks
	Type toc.Type
	Mode uint32 // permission bits
	Size int64  // of a regular file, in bytes
	// Layer and Entry are those of [Object], of a regular file.
	Layer, Entry int
}

// Lookup returns the file that a process finds at a path, whose root directory is the tree's: symlinks are followed, to the last one,
// and relative paths begin at the root. It is false if there is none.
func (t *Tree) Lookup(name string) (File, bool) {
	name, n := t.walk(name)
	if n == 0 {
		return File{}, false
	}
	in := &t.inodes[n]
	f := File{Name: name, Type: in.typ, Mode: in.attr.Mode}
	if in.typ == toc.Regular {
		f.Size, f.Layer, f.Entry = t.entry(n).Size, int(in.layer), int(in.entry)
	}
	return f, true
}

// List returns the names in the directory at a path, sorted; none if there is no directory.
func (t *Tree) List(name string) []string {
	_, n := t.walk(name)
	if n == 0 || t.inodes[n].typ != toc.Directory {
		return nil
	}
	var names []string
	for _, d := range t.kids[t.inodes[n].from:t.inodes[n].to] {
		if name := t.dentries[d].name; name != "." && name != ".." {
			names = append(names, name)
		}
	}
	return names
}

// walk returns the inode at a path and its name without symlinks, or 0.
func (t *Tree) walk(name string) (string, int32) {
	name = path.Clean("/" + name)[1:]
	links := 0
restart:
	n := t.root
	for at := 0; at < len(name); {
		end := at + elem(name[at:])
		if n = t.child(n, name[at:end]); n == 0 {
			return "", 0
		}
		if t.inodes[n].typ == toc.Symlink {
			if links++; links > maxFollowed {
				return "", 0
			}
			target := t.entry(n).Link
			if target[0] != '/' {
				target = name[:at] + target
			}
			if name = path.Clean("/" + target + name[end:])[1:]; len(name) > maxPath {
				return "", 0
			}
			goto restart
		}
		at = end + 1
	}
	return name, n
}

// maxFollowed is how many symlinks Linux follows in one walk (MAXSYMLINKS).
const maxFollowed = 40

// child returns what a directory shows under a name, or 0.
func (t *Tree) child(dir int32, name string) int32 {
	if t.inodes[dir].typ != toc.Directory {
		return 0
	}
	kids := t.kids[t.inodes[dir].from:t.inodes[dir].to]
	i := sort.Search(len(kids), func(i int) bool { return t.dentries[kids[i]].name >= name })
	if i == len(kids) || t.dentries[kids[i]].name != name {
		return 0
	}
	return t.dentries[kids[i]].inode
}
