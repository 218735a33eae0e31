// Package worst writes the worst image: a small OCI image, well formed in every part, that uses
// everything the tar formats, Linux file systems and the layer rules allow and that ordinary images hardly ever use.
//
// [Write] makes an OCI layout of gzip layers. The same options give the same bytes, so digests can be compared. Nothing
// in it is malformed and nothing needs a guess: what containerd and umoci make of it is the same tree,
// except for what [Image] lists, each with the unpacker that is to blame.
package worst

import (
	"archive/tar"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"
)

// Options say what the image holds. The zero value is the whole image but for what takes long.
type Options struct {
	// Huge adds a layer with one file of [HugeSize] bytes.
	Huge bool
	// Many adds a layer with [ManyFiles] files in one directory.
	Many bool
	// LowerLinks adds hard links to files of lower layers. containerd's overlayfs
	// snapshotter cannot unpack them: there the target is in another directory.
	LowerLinks bool
	// GNUSparse adds old GNU sparse files. containerd and umoci refuse them; PAX ones with the same content are always there.
	GNUSparse bool
	// Plain leaves out what stargz-snapshotter's converter gets wrong or refuses: sparse files, names and symlinks that
	// are not UTF-8, entries that replace a directory of the same layer or are replaced by one.
	Plain bool
}

const (
	// HugeSize is the length of huge/file in bytes: 3 GB and an odd piece.
	HugeSize = 3_000_000_007
	// ManyFiles is how many files the directory many holds.
	ManyFiles = 100_000
)

// An Image is what was written, and where unpackers are known to differ.
type Image struct {
	// Layers is the number of layers, empty and repeated ones included.
	Layers int
	// Unknown holds the directories of which no layer says the time: parents without entries, and the root (""),
	// whose entry containerd ignores.
	Unknown []string
	// Inherited holds the directories that a layer writes into without an entry for them, so that a lower layer's
	// attributes hold. containerd gives them the time of the unpacking.
	Inherited []string
	// Options are what it was written with.
	Options Options
	// HiddenLinks holds the names of files of which another name was removed or replaced in a
	// higher layer: overlayfs still counts that name.
	HiddenLinks []string
}

// Write makes the image in dir, which must not exist or be empty, under the name latest.
func Write(dir string, o Options) (*Image, error) {
	w, err := newLayout(dir)
	if err != nil {
		return nil, err
	}
	img := &Image{
		Options:     o,
		Unknown:     []string{"", "implicit", "implicit/in", "implicit/in/one"},
		Inherited:   []string{"change/implied", "opaque/implied"},
		HiddenLinks: []string{"links/half/stays", "links/replaced/stays"},
	}
	steps := []struct {
		name string
		fill func(*layer)
	}{
		{"types", func(l *layer) { everything(l, o) }},
		{"empty", func(*layer) {}},
		{"change", func(l *layer) { change(l, o) }},
		{"empty again", func(*layer) {}},
		{"back", back},
	}
	if o.Many {
		steps = append(steps, struct {
			name string
			fill func(*layer)
		}{"many", many})
	}
	if o.Huge {
		steps = append(steps, struct {
			name string
			fill func(*layer)
		}{"huge", huge})
	}
	steps = append(steps, struct {
		name string
		fill func(*layer)
	}{"again", again})
	for _, s := range steps {
		if err := w.layer(s.name, s.fill); err != nil {
			return nil, fmt.Errorf("layer %s: %w", s.name, err)
		}
	}
	img.Layers = len(steps)
	return img, w.close()
}

// epoch is where the times of ordinary entries start.
var epoch = time.Date(2024, 2, 29, 12, 0, 0, 123456789, time.UTC)

// everything is the lowest layer: each type of file with each attribute, each tar format.
func everything(l *layer, o Options) {
	l.dir("./", 0o755)
	for _, d := range []string{"types", "modes", "sizes", "xattrs", "times", "names", "symlinks", "owners", "formats",
		"sparse", "twice", "change", "opaque", "white"} {
		l.dir(d+"/", 0o755)
	}
	types(l)
	links(l)
	modes(l)
	sizes(l)
	xattrs(l)
	times(l)
	names(l, o)
	symlinks(l, o)
	owners(l)
	formats(l, o)
	if !o.Plain {
		sparse(l, o)
	}
	twice(l, o)

	// Parents without entries.
	l.file("implicit/in/one/file", "no directory above has an entry\n")

	// What the layers above will change.
	for _, d := range []string{"change/dir-file/", "change/dir-link/", "change/dir-dir/", "change/implied/", "change/dir-file-dir/", "change/attrs/",
		"opaque/entry/", "opaque/implied/", "opaque/before/", "opaque/after/", "opaque/deep/", "opaque/deep/er/", "opaque/twice/", "opaque/emptied/",
		"white/dir/", "white/dir/sub/", "white/again/", "white/readd/"} {
		l.add(tar.Header{Name: d, Typeflag: tar.TypeDir, Mode: 0o750, Uid: 5, PAXRecords: xattr("user.layer", "0")}, "")
		l.file(d+"old", "old "+d+"\n")
		l.file(d+"kept?", "kept? "+d+"\n")
	}
	l.file("change/file-dir", "a file\n")
	l.file("change/file-dir-file", "a file\n")
	l.file("change/file-link", "a file\n")
	l.file("change/file-device", "a file\n")
	l.file("change/file-file", "short\n")
	l.file("change/content-only", "aaaa\n")
	l.file("change/mode-only", "same\n")
	l.symlink("change/link-dir", "dir-dir")
	l.symlink("change/link-file", "file-file")
	l.special("change/device-file", tar.TypeChar, 1, 3)
	l.special("change/fifo-file", tar.TypeFifo, 0, 0)
	l.file("white/file", "goes\n")
	l.file("white/removed, added, removed", "goes\n")
	l.file("white/removed, added", "goes\n")
	l.file("white/with a replacement", "goes\n")
	l.symlink("white/symlink", "file")
	l.special("white/fifo", tar.TypeFifo, 0, 0)
	l.special("white/device", tar.TypeBlock, 7, 1)
}

// change is the layer that replaces, removes and hides.
func change(l *layer, o Options) {
	l.dir("change/", 0o711)
	// A replaced directory shows nothing of the lower one, also where a directory comes back later.
	l.file("change/dir-file", "now a file\n")
	l.symlink("change/dir-link", "dir-dir")
	l.file("change/dir-file-dir", "a file for one layer\n")
	l.add(tar.Header{Name: "change/dir-dir/", Typeflag: tar.TypeDir, Mode: 0o700, Uid: 7, Gid: 8, PAXRecords: xattr("user.new", "1")}, "")
	l.file("change/dir-dir/new", "new\n")
	l.dir("change/file-dir/", 0o755)
	l.file("change/file-dir/in", "in a directory that was a file\n")
	l.dir("change/file-dir-file/", 0o755)
	l.file("change/file-dir-file/in", "in a directory for one layer\n")
	l.symlink("change/file-link", "no/such/file")
	l.special("change/file-device", tar.TypeChar, 5, 1)
	l.file("change/file-file", "a longer content than before\n")
	l.file("change/content-only", "bbbb\n")
	l.add(tar.Header{Name: "change/mode-only", Mode: 0o4711}, "same\n")
	l.dir("change/link-dir/", 0o755)
	l.file("change/link-dir/in", "in a directory that was a link\n")
	l.file("change/link-file", "a file that was a link\n")
	l.file("change/device-file", "a file that was a device\n")
	l.file("change/fifo-file", "a file that was a fifo\n")
	l.file("change/implied/new", "its directory has no entry here\n")
	l.dir("change/attrs/", 0o2777)

	l.dir("opaque/", 0o755)
	l.dir("opaque/entry/", 0o755)
	l.opaque("opaque/entry")
	l.file("opaque/entry/new", "new\n")
	l.opaque("opaque/implied")
	l.file("opaque/implied/new", "new\n")
	l.opaque("opaque/before")
	l.add(tar.Header{Name: "opaque/before/", Typeflag: tar.TypeDir, Mode: 0o701, PAXRecords: xattr("user.layer", "0")}, "")
	l.file("opaque/before/old", "another old\n")
	l.dir("opaque/after/", 0o701)
	l.file("opaque/after/new", "new\n")
	l.file("opaque/after/old", "another old\n")
	l.opaque("opaque/after")
	l.dir("opaque/deep/", 0o755)
	l.opaque("opaque/deep")
	l.dir("opaque/deep/er/", 0o755)
	l.file("opaque/deep/er/new", "new\n")
	l.dir("opaque/twice/", 0o755)
	l.opaque("opaque/twice")
	l.opaque("opaque/twice")
	l.file("opaque/twice/new", "new\n")
	l.dir("opaque/emptied/", 0o755)
	l.opaque("opaque/emptied")

	l.dir("white/", 0o755)
	l.whiteout("white/file")
	l.whiteout("white/dir")
	l.whiteout("white/symlink")
	l.whiteout("white/fifo")
	l.whiteout("white/device")
	l.whiteout("white/never there")
	l.whiteout("white/removed, added, removed")
	l.whiteout("white/removed, added")
	l.whiteout("white/again")
	l.whiteout("white/with a replacement")
	l.file("white/with a replacement", "whiteout first, then the file\n")
	l.dir("white/readd/", 0o755)
	l.whiteout("white/readd/old")

	l.dir("links/", 0o755)
	l.dir("links/half/", 0o755)
	l.whiteout("links/half/goes")
	l.dir("links/replaced/", 0o755)
	l.file("links/replaced/changes", "another content\n")
	l.whiteout("names/" + strings.Repeat("w", 251)) // with its prefix, the longest whiteout there can be
	l.add(tar.Header{Name: "names/", Typeflag: tar.TypeDir, Mode: 0o755}, "")

	if o.LowerLinks {
		l.link("links/to a lower layer", "sizes/4097")
		l.link("links/to a lower symlink", "symlinks/absolute")
	}
}

// back puts back what was replaced and removed.
func back(l *layer) {
	l.dir("change/", 0o755)
	l.dir("change/dir-file-dir/", 0o755)
	l.file("change/dir-file-dir/new", "a directory again\n")
	l.file("change/file-dir-file", "a file again\n")
	l.dir("white/", 0o755)
	l.file("white/removed, added, removed", "for one layer\n")
	l.file("white/removed, added", "is back\n")
	l.dir("white/again/", 0o755)
	l.file("white/again/new", "the old are still gone\n")
	l.dir("white/dir/", 0o755)
	l.dir("white/readd/", 0o755)
	l.file("white/readd/old", "old is back\n")
}

// again is the highest layer: it removes what was removed and added before.
func again(l *layer) {
	l.dir("white/", 0o1777)
	l.whiteout("white/removed, added, removed")
	l.whiteout("white/file") // removed already
	l.dir("opaque/", 0o755)
	l.dir("opaque/entry/", 0o755)
	l.file("opaque/entry/newer", "above an opaque directory\n")
}

func types(l *layer) {
	l.file("types/file", "a file\n")
	l.dir("types/dir/", 0o755)
	l.symlink("types/symlink", "file")
	l.special("types/fifo", tar.TypeFifo, 0, 0)
	l.special("types/null", tar.TypeChar, 1, 3)
	l.special("types/console", tar.TypeChar, 5, 1)
	l.special("types/loop200", tar.TypeBlock, 7, 200)
	l.special("types/minor300", tar.TypeBlock, 259, 300)
	l.special("types/highest", tar.TypeChar, 1<<12-1, 1<<20-1)
}

func links(l *layer) {
	l.dir("links/", 0o755)
	for _, d := range []string{"links/a/", "links/b/", "links/c/", "links/half/", "links/replaced/"} {
		l.dir(d, 0o755)
	}
	l.file("links/a/one", "one inode, four names\n")
	l.link("links/b/two", "links/a/one")
	l.link("links/c/three", "links/b/two") // a chain: the target is a link itself
	l.link("./links/./four", "./links/c/three")
	l.symlink("links/symlink", "a/one")
	l.link("links/symlink too", "links/symlink")
	l.special("links/fifo", tar.TypeFifo, 0, 0)
	l.link("links/fifo too", "links/fifo")
	l.special("links/device", tar.TypeChar, 1, 5)
	l.link("links/device too", "links/device")
	l.file("links/empty", "")
	l.link("links/empty too", "links/empty")
	l.file("links/a/same content", "two inodes with the same content\n")
	l.file("links/b/same content", "two inodes with the same content\n")
	l.file("links/a/popular", "hundred names\n")
	for i := range 99 {
		l.link(fmt.Sprintf("links/b/popular%02d", i), "links/a/popular")
	}
	l.file("links/half/stays", "of two names one goes\n")
	l.link("links/half/goes", "links/half/stays")
	l.file("links/replaced/stays", "of two names one becomes another file\n")
	l.link("links/replaced/changes", "links/replaced/stays")
	h := tar.Header{Name: "links/capable", Mode: 0o4755, Uid: 12, PAXRecords: xattr("security.capability", capability2)}
	l.add(h, "links share attributes\n")
	h.Name, h.Linkname, h.Typeflag = "links/capable too", "links/capable", tar.TypeLink
	h.ModTime = l.last
	l.add(h, "")
}

func modes(l *layer) {
	for _, m := range []int64{0, 0o400, 0o111, 0o666, 0o777, 0o1644, 0o2755, 0o4755, 0o6711, 0o7777, 0o7000} {
		l.add(tar.Header{Name: fmt.Sprintf("modes/file %04o", m), Mode: m, Uid: 3, Gid: 4}, "mode\n")
		d := fmt.Sprintf("modes/dir %04o/", m)
		l.add(tar.Header{Name: d, Typeflag: tar.TypeDir, Mode: m, Uid: 3, Gid: 4}, "")
		l.file(d+"in", "in a directory of that mode\n")
		l.add(tar.Header{Name: fmt.Sprintf("modes/fifo %04o", m), Typeflag: tar.TypeFifo, Mode: m}, "")
	}
}

func sizes(l *layer) {
	for _, n := range []int{0, 1, 511, 512, 513, 4095, 4096, 4097, 65535, 65536, 65537, 131073, 1<<20 - 1, 1 << 20, 1<<20 + 3,
		4<<20 - 1, 4 << 20, 4<<20 + 1, 9_000_001} {
		l.add(tar.Header{Name: fmt.Sprintf("sizes/%d", n), Mode: 0o644, Size: int64(n)}, text(n))
	}
	l.add(tar.Header{Name: "sizes/noise", Mode: 0o644}, noise(3_000_001))
	l.add(tar.Header{Name: "sizes/zeros", Mode: 0o644}, strings.Repeat("\x00", 6_000_000))
	l.add(tar.Header{Name: "sizes/repeated", Mode: 0o644}, strings.Repeat(noise(64<<10), 80)) // the same chunk many times
}

// A security.capability with CAP_NET_RAW permitted and effective: version 2, and
// version 3 of the root of a user namespace (include/uapi/linux/capability.h).
const (
	capability2 = "\x01\x00\x00\x02" + "\x00\x20\x00\x00" + "\x00\x00\x00\x00" + "\x00\x00\x00\x00" + "\x00\x00\x00\x00"
	capability3 = "\x01\x00\x00\x03" + "\x00\x20\x00\x00" + "\x00\x00\x00\x00" + "\x00\x00\x00\x00" + "\x00\x00\x00\x00" + "\xa0\x86\x01\x00"
)

// acl is an access control list of mode 0674: user 1000 may read, the group read and write under a mask
// of rwx (include/uapi/linux/posix_acl_xattr.h: version 2, then tag, permissions and id).
const acl = "\x02\x00\x00\x00" +
	"\x01\x00\x06\x00\xff\xff\xff\xff" + // the owner
	"\x02\x00\x04\x00\xe8\x03\x00\x00" + // user 1000
	"\x04\x00\x06\x00\xff\xff\xff\xff" + // the group
	"\x10\x00\x07\x00\xff\xff\xff\xff" + // the mask
	"\x20\x00\x04\x00\xff\xff\xff\xff" // others

func xattrs(l *layer) {
	l.add(tar.Header{Name: "xattrs/several", Mode: 0o644, PAXRecords: xattr(
		"user.a", "1", "user.b", "two", "user.equals", "x=y", "user.UPPER case and ünicode", "ü")}, "x\n")
	l.add(tar.Header{Name: "xattrs/binary", Mode: 0o644, PAXRecords: xattr(
		"user.nul", "a\x00b\x00", "user.only nul", "\x00", "user.newline", "a\nb\n", "user.bytes", "\xff\xfe\x80")}, "x\n")
	l.add(tar.Header{Name: "xattrs/empty", Mode: 0o644, PAXRecords: xattr("user.empty", "")}, "x\n")
	l.add(tar.Header{Name: "xattrs/long", Mode: 0o644, PAXRecords: xattr("user.long", text(2500), "user."+strings.Repeat("n", 250), "v")}, "x\n")
	l.add(tar.Header{Name: "xattrs/on no bytes", Mode: 0o644, PAXRecords: xattr("user.a", "1")}, "")
	l.add(tar.Header{Name: "xattrs/dir/", Typeflag: tar.TypeDir, Mode: 0o755, PAXRecords: xattr("user.dir", "1")}, "")
	l.add(tar.Header{Name: "xattrs/capability 2", Mode: 0o755, PAXRecords: xattr("security.capability", capability2)}, "x\n")
	l.add(tar.Header{Name: "xattrs/capability 3", Mode: 0o755, Uid: 1000, PAXRecords: xattr("security.capability", capability3)}, "x\n")
	l.add(tar.Header{Name: "xattrs/acl", Mode: 0o674, PAXRecords: xattr("system.posix_acl_access", acl)}, "x\n")
	l.add(tar.Header{Name: "xattrs/acl dir/", Typeflag: tar.TypeDir, Mode: 0o674, PAXRecords: xattr(
		"system.posix_acl_access", acl, "system.posix_acl_default", acl, "user.too", "1")}, "")
	// What makes two files share their attributes in a metadata image.
	for i := range 20 {
		l.add(tar.Header{Name: fmt.Sprintf("xattrs/shared%d", i), Mode: 0o644, PAXRecords: xattr("user.shared", text(300))}, "x\n")
	}
}

func times(l *layer) {
	for _, t := range []struct {
		name string
		time time.Time
	}{
		{"0", time.Unix(0, 0)},
		{"1 ns", time.Unix(0, 1)},
		{"-1 ns", time.Unix(0, -1)},
		{"-1.5 s", time.Unix(-2, 500_000_000)},
		{"-1 s", time.Unix(-1, 0)},
		{"1950", time.Date(1950, 1, 2, 3, 4, 5, 600_000_007, time.UTC)},
		{"1902", time.Date(1902, 1, 1, 0, 0, 0, 999_999_999, time.UTC)},
		{"2^31-1", time.Unix(1<<31-1, 999_999_999)},
		{"2^31", time.Unix(1<<31, 0)},
		{"2^32", time.Unix(1<<32, 1)},
		{"2200", time.Date(2200, 12, 31, 23, 59, 59, 999_999_999, time.UTC)},
		{"2261", time.Date(2261, 1, 1, 0, 0, 0, 10, time.UTC)},
		{"whole second", time.Unix(1_700_000_000, 0)},
		{"100 ns", time.Unix(1_700_000_000, 100)},
		{"999999999 ns", time.Unix(1_700_000_000, 999_999_999)},
	} {
		l.add(tar.Header{Name: "times/file " + t.name, Mode: 0o644, ModTime: t.time}, "time\n")
		l.add(tar.Header{Name: "times/dir " + t.name + "/", Typeflag: tar.TypeDir, Mode: 0o755, ModTime: t.time}, "")
		l.add(tar.Header{Name: "times/dir " + t.name + "/in", Mode: 0o644, ModTime: t.time}, "")
		l.add(tar.Header{Name: "times/link " + t.name, Typeflag: tar.TypeSymlink, Linkname: "file " + t.name, Mode: 0o777, ModTime: t.time}, "")
		l.add(tar.Header{Name: "times/fifo " + t.name, Typeflag: tar.TypeFifo, Mode: 0o644, ModTime: t.time}, "")
		l.add(tar.Header{Name: "times/device " + t.name, Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3, Mode: 0o644, ModTime: t.time}, "")
	}
	l.add(tar.Header{Name: "times/gnu 1950", Mode: 0o644, Format: tar.FormatGNU, ModTime: time.Date(1950, 1, 2, 3, 4, 5, 0, time.UTC)}, "time\n")
	l.add(tar.Header{Name: "times/gnu 2261", Mode: 0o644, Format: tar.FormatGNU, ModTime: time.Date(2261, 1, 2, 3, 4, 5, 0, time.UTC)}, "time\n")
}

func names(l *layer, o Options) {
	for _, n := range []string{
		" ", "  leading and trailing  ", "new\nline", "\n", "tab\there", "-", "--help", "-rf", "~", "#", "$HOME", "*", "?", "[a]", "`id`", "'", "\"", "\\", "a\\b", "a:b", "a,b", "a=b",
		"...", "....", ".hidden", "..hidden", "trailing.", ".wh", ".whiteout", "a.wh.b", "wh.x", ".WH.x", "stargz.index.json.txt", ".no.prefetch.landmark.txt",
		"\x01", "\x7f", "\x1b[31mred", "\xff", "\xff\xfe\xfd", "caf\xe9", "ab\x80cd", "\xc3\x28", "\xed\xa0\x80",
		"é", "e\u0301", "日本語", "🐢", "İ", "CASE", "case", "Case", "100%", "%s%n", "a b", "a\u00a0b", "\u200b",
		strings.Repeat("n", 255), strings.Repeat("é", 127) + "e", strings.Repeat("w", 251), strings.Repeat("\xff", 255), strings.Repeat(" ", 100), strings.Repeat("m", 100), strings.Repeat("m", 101),
	} {
		if o.Plain && !utf8.ValidString(n) {
			continue
		}
		l.file("names/"+n, "a file called "+n+"\n")
	}
	l.dir("names/dirs/", 0o755)
	for _, n := range []string{"new\nline", "\xff", "-", strings.Repeat("d", 255), " "} {
		if o.Plain && !utf8.ValidString(n) {
			continue
		}
		l.dir("names/dirs/"+n+"/", 0o755)
		l.file("names/dirs/"+n+"/"+n, "in "+n+"\n")
		l.link("names/dirs/"+n+"/link to "+n[:1], "names/dirs/"+n+"/"+n)
		l.symlink("names/dirs/"+n+"/to "+n[:1], n)
	}
	deep := "names/deep"
	l.dir(deep+"/", 0o755)
	for i := range 60 {
		deep += fmt.Sprintf("/level-%02d-%s", i, strings.Repeat("x", i%50))
		l.dir(deep+"/", 0o755)
	}
	l.file(deep+"/file", "deep down\n")
	l.link("names/link to the deep", deep+"/file")
	l.dir("./names/dots/", 0o755)
	l.file("./names/./dots//file", "written ./names/./dots//file\n")
}

func symlinks(l *layer, o Options) {
	for _, s := range [][2]string{
		{"absolute", "/types/file"}, {"relative", "../types/file"}, {"broken", "no/such/file"}, {"broken absolute", "/no/such/file"},
		{"self", "self"}, {"loop a", "loop b"}, {"loop b", "loop a"}, {"dot", "."}, {"dotdot", ".."}, {"above the root", "../../../../../../etc/passwd"},
		{"root", "/"}, {"slashes", "//types///file"}, {"trailing slash", "../types/dir/"}, {"to a directory", "../types"}, {"through another", "to a directory/file"},
		{"spaces and lines", " a \n b "}, {"bytes", "\xff\xfe/\x80"}, {"long", strings.Repeat("0123456789", 400)}, {"99", strings.Repeat("x", 99)}, {"100", strings.Repeat("x", 100)}, {"101", strings.Repeat("x", 101)},
		{"64", strings.Repeat("y", 64)}, {"longest", strings.Repeat("z/", 2047) + "z"},
	} {
		if o.Plain && !utf8.ValidString(s[1]) {
			continue
		}
		l.symlink("symlinks/"+s[0], s[1])
	}
	l.add(tar.Header{Name: "symlinks/owned", Typeflag: tar.TypeSymlink, Linkname: "x", Uid: 1000, Gid: 100000, Mode: 0o777}, "")
	l.add(tar.Header{Name: "symlinks/gnu long", Typeflag: tar.TypeSymlink, Linkname: strings.Repeat("g", 300), Mode: 0o777, Format: tar.FormatGNU, ModTime: epoch.Truncate(time.Second)}, "")
}

func owners(l *layer) {
	for _, n := range []int{1, 1000, 65534, 65535, 65536, 70000, 1<<21 - 1, 1 << 21, 3_000_000, 1 << 31, 1<<32 - 2} {
		name := fmt.Sprintf("owners/%d", n)
		l.add(tar.Header{Name: name, Mode: 0o644, Uid: n, Gid: n}, "owned\n")
		l.add(tar.Header{Name: name + " gnu", Mode: 0o644, Uid: n, Gid: 0, Format: tar.FormatGNU, ModTime: epoch.Truncate(time.Second)}, "owned\n")
		l.add(tar.Header{Name: name + " dir/", Typeflag: tar.TypeDir, Mode: 0o755, Gid: n}, "")
		l.add(tar.Header{Name: name + " link", Typeflag: tar.TypeSymlink, Linkname: "x", Mode: 0o777, Uid: n}, "")
		l.add(tar.Header{Name: name + " device", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3, Mode: 0o600, Uid: n, Gid: 1}, "")
	}
	// Names of owners mean nothing: only numbers count.
	l.add(tar.Header{Name: "owners/named", Mode: 0o644, Uid: 1234, Gid: 4321, Uname: "root", Gname: "daemon"}, "owned\n")
}

func formats(l *layer, o Options) {
	whole := epoch.Truncate(time.Second)
	l.add(tar.Header{Name: "formats/ustar", Mode: 0o644, Format: tar.FormatUSTAR, ModTime: whole}, "ustar\n")
	prefix := "formats/" + strings.Repeat("p", 90) + "/"
	l.add(tar.Header{Name: prefix, Typeflag: tar.TypeDir, Mode: 0o755, Format: tar.FormatUSTAR, ModTime: whole}, "")
	l.add(tar.Header{Name: prefix + strings.Repeat("q", 90), Mode: 0o644, Format: tar.FormatUSTAR, ModTime: whole}, "a name with a prefix\n")
	l.add(tar.Header{Name: "formats/gnu", Mode: 0o644, Format: tar.FormatGNU, ModTime: whole}, "gnu\n")
	l.add(tar.Header{Name: "formats/gnu " + strings.Repeat("l", 200), Mode: 0o644, Format: tar.FormatGNU, ModTime: whole}, "a long gnu name\n")
	l.add(tar.Header{Name: "formats/gnu long link", Typeflag: tar.TypeLink, Linkname: "formats/gnu " + strings.Repeat("l", 200), Mode: 0o644, Format: tar.FormatGNU, ModTime: whole}, "")
	if !o.Plain {
		l.add(tar.Header{Name: "formats/gnu caf\xe9", Mode: 0o644, Format: tar.FormatGNU, ModTime: whole}, "not UTF-8\n")
	}
	l.add(tar.Header{Name: "formats/pax", Mode: 0o644, Format: tar.FormatPAX, PAXRecords: map[string]string{"comment": "x", "VENDOR.key": "v"}}, "pax\n")
	l.add(tar.Header{Name: "formats/pax " + strings.Repeat("l", 200), Mode: 0o644, Format: tar.FormatPAX}, "a long pax name\n")
	l.add(tar.Header{Name: "formats/pax times", Mode: 0o644, Format: tar.FormatPAX, AccessTime: epoch, ChangeTime: epoch}, "pax\n")
	l.raw(rawHeader{name: "formats/v7", mode: 0o640, size: 3, mtime: whole.Unix(), version: v7}, "v7\n")
	l.raw(rawHeader{name: "formats/v7 dir/", mode: 0o750, mtime: whole.Unix(), version: v7}, "") // a directory by its slash
	l.raw(rawHeader{name: "formats/no type", mode: 0o640, size: 2, mtime: whole.Unix(), version: ustar}, "x\n")
	l.raw(rawHeader{name: "formats/a link with a size", typeflag: tar.TypeSymlink, link: "v7", mode: 0o777, mtime: whole.Unix(), version: ustar}, "")
	// A PAX header that overrides what the plain header says.
	records := map[string]string{"path": "formats/by pax", "size": "6", "uid": "77", "gid": "88", "mtime": "1234567890.25"}
	l.pax(records)
	l.raw(rawHeader{name: "formats/wrong", mode: 0o604, size: 6, mtime: 1, version: ustar, typeflag: tar.TypeReg}, "by pax")
}

func sparse(l *layer, o Options) {
	type piece struct {
		off  int64
		data string
	}
	for _, s := range []struct {
		name   string
		size   int64
		pieces []piece
	}{
		{"holes only", 1 << 20, nil},
		{"hole first", 100_000, []piece{{65536, "data after a hole"}}},
		{"hole last", 100_000, []piece{{0, "data before a hole"}}},
		{"in the middle", 9 << 20, []piece{{0, "start"}, {5<<20 + 1, noise(70_001)}, {9<<20 - 3, "end"}}},
		{"many pieces", 60 * 8192, func() (p []piece) {
			for i := range 60 {
				p = append(p, piece{int64(i) * 8192, fmt.Sprintf("piece %02d", i)})
			}
			return p
		}()},
		{"dense", 4, []piece{{0, "full"}}},
	} {
		var m []span
		var data string
		for _, p := range s.pieces {
			m = append(m, span{p.off, int64(len(p.data))})
			data += p.data
		}
		if o.GNUSparse {
			l.sparseGNU("sparse/gnu "+s.name, s.size, m, data)
		}
		l.sparse01("sparse/pax 0.1 "+s.name, s.size, m, data)
		l.sparse10("sparse/pax 1.0 "+s.name, s.size, m, data)
	}
}

// twice has names that come more than once in one tar: the last one counts.
func twice(l *layer, o Options) {
	l.file("twice/file", "the first\n")
	l.file("twice/file", "the second, which is longer\n")
	l.file("twice/file", "third\n")
	l.add(tar.Header{Name: "twice/link file", Typeflag: tar.TypeSymlink, Linkname: "../types/file", Mode: 0o777}, "")
	l.file("twice/link file", "not written through the link\n")
	l.file("twice/file link", "goes\n")
	l.symlink("twice/file link", "file")
	l.special("twice/device file", tar.TypeChar, 1, 3)
	l.file("twice/device file", "not written to the device\n")
	l.dir("twice/dir/", 0o700)
	l.file("twice/dir/in", "stays\n")
	l.add(tar.Header{Name: "twice/dir/", Typeflag: tar.TypeDir, Mode: 0o751, Uid: 9}, "") // merged: the content stays
	l.file("twice/again linked", "an inode that keeps two names\n")
	l.link("twice/again link", "twice/again linked")
	l.link("twice/again link", "twice/again linked")
	l.file("twice/attrs", "x\n")
	l.add(tar.Header{Name: "twice/attrs", Mode: 0o600, PAXRecords: xattr("user.second", "1")}, "x\n")

	// A directory whose entry comes after what is in it.
	l.file("twice/late/in", "before its directory\n")
	l.add(tar.Header{Name: "twice/late/", Typeflag: tar.TypeDir, Mode: 0o711, Uid: 6}, "")

	if o.Plain {
		return
	}
	// containerd sets the times of directories last, by name: a file that replaces a directory of the same
	// tar gets the directory's time. So both have the same here.
	l.add(tar.Header{Name: "twice/dir file/", Typeflag: tar.TypeDir, Mode: 0o755}, "")
	at := l.last
	l.file("twice/dir file/in", "goes\n")
	l.add(tar.Header{Name: "twice/dir file", Mode: 0o644, ModTime: at}, "was a directory\n")
	l.file("twice/file dir", "goes\n")
	l.dir("twice/file dir/", 0o755)
	l.file("twice/file dir/in", "was a file\n")
}

func many(l *layer) {
	l.dir("many/", 0o755)
	for i := range ManyFiles {
		var content string
		switch {
		case i%10 == 3:
			content = fmt.Sprintf("one of a hundred contents: %d\n", i/10%100)
		case i%50 == 7:
		default:
			content = fmt.Sprintf("file %d\n", i)
		}
		l.file(fmt.Sprintf("many/%05d", i), content)
	}
}

// huge is a file that is mostly easy to compress, with noise in odd places and every block different.
func huge(l *layer) {
	l.dir("huge/", 0o755)
	l.stream(tar.Header{Name: "huge/file", Mode: 0o644, Size: HugeSize}, &hugeReader{size: HugeSize})
}

func xattr(pairs ...string) map[string]string {
	m := make(map[string]string, len(pairs)/2)
	for i := 0; i < len(pairs); i += 2 {
		m["SCHILY.xattr."+pairs[i]] = pairs[i+1]
	}
	return m
}
