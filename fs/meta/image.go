package meta

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash/crc32"
	"io"

	"lazuli/fs/toc"
)

// What the kernel reads: fs/erofs/erofs_fs.h.
const (
	blockBits = 12
	blockSize = 1 << blockBits
	nidSize   = 32 // an inode's number is its place in the image in these units

	superOffset = 1024
	superSize   = 128
	superMagic  = 0xe0f5e1e2

	compatChecksum      = 1 << 0
	compatMTime         = 1 << 1
	incompatChunkedFile = 1 << 2

	inodeSize  = 64 // extended: the compact one has no time and no large owner
	extended   = 1  // i_format, bit 0
	direntSize = 12

	layoutPlain  = 0 << 1 // i_format, from bit 1
	layoutInline = 2 << 1
	layoutChunks = 4 << 1

	xattrHeader    = 12
	xattrEntry     = 4
	xattrMaxShared = 255
	// maxShared is the size of the largest xattr that is shared, in bytes of the
	// image: go-erofs reads no more than a block.
	maxShared = 1024

	// One chunk of a regular file: as large as the format can say, so that all
	// but the largest need a single address. It is the null address, a hole.
	chunkBits = 31 // more than blockBits
	chunkSize = int64(blockSize) << chunkBits
	nullAddr  = 0xffffffff
	// maxFileSize, in bytes, is that of ext4: two chunks.
	maxFileSize = 16 << 40

	// Larger tails of directories and symlinks get a block of their own: fitted
	// in behind the inode, they would waste as much in front of it.
	maxInline = blockSize / 2
)

// Stats say what is in a metadata image.
type Stats struct {
	Inodes       int   // files, directories and links, each once
	Entries      int   // names, without the root
	Bytes        int64 // size of the image
	RegularBytes int64 // sizes of all regular files, each inode once
}

// place is where an inode is in the image.
type place struct {
	pos    int64 // of the inode, in bytes of the image; 0 before it has one
	block  int64 // of the data, counted from the first data block, if not all inline
	size   int64 // i_size
	xattrs int32 // size of the inode's xattrs, in bytes
	key    int32 // of a regular file: index of Tree.keys
	layout byte
}

// shared are the xattrs that the image has once, for many inodes.
type shared struct {
	count map[toc.Xattr]int    // how often each xattr occurs in the layers
	id    map[toc.Xattr]uint32 // where it is, in 4 bytes from the start
	list  []toc.Xattr
	size  int64 // of all of them, in bytes
}

// metacopy tells overlayfs that the data is elsewhere. Every file with data has it.
var metacopy = toc.Xattr{Name: "trusted.overlay.metacopy"}

// redirectName is the xattr that tells overlayfs where: a path in the data-only layers.
const (
	redirectName = "trusted.overlay.redirect"
	redirectSize = len("/a/") + 2*sha256.Size - 1
)

// xattrSize returns the size of an entry in the image, in bytes.
func xattrSize(x toc.Xattr) int64 {
	_, rest, _ := namespace(x.Name)
	return align(int64(xattrEntry+len(rest)+len(x.Value)), 4)
}

func align(n, to int64) int64 { return (n + to - 1) / to * to }

// share returns the id of x if it is worth sharing.
func (s *shared) share(x toc.Xattr) (uint32, bool) {
	if id, ok := s.id[x]; ok {
		return id, true
	}
	if x != metacopy && (s.count[x] < 2 || xattrSize(x) > maxShared) {
		return 0, false
	}
	id := uint32(s.size / 4)
	s.id[x] = id
	s.list = append(s.list, x)
	s.size += xattrSize(x)
	return id, true
}

// lay puts the layers with the given roots on top of each other, and every inode into its
// place: a directory's files one after another, in the order of their names, as a
// walk reads them.
func (t *Tree) lay(roots []int32) error {
	t.shared.id = make(map[toc.Xattr]uint32)
	t.kids = make([]int32, 0, len(t.dentries)+len(t.dentries)/4)
	t.order = make([]int32, 0, len(t.inodes))
	t.metaEnd = superOffset + superSize

	// overlayfs merges the roots of all layers, opaque or not.
	root := roots[len(roots)-1]
	t.root = root
	top := &t.inodes[root]
	for i := len(roots) - 1; i > 0; i-- {
		below := &t.inodes[roots[i-1]]
		t.inodes[roots[i]].below = roots[i-1]
		if top.entry < 0 {
			top.attr, top.xattrs, top.entry = below.attr, below.xattrs, below.entry
		}
		top.merged = true
	}
	t.merge(root, root)
	if err := t.put(root); err != nil {
		return err
	}
	if err := t.layDir(root); err != nil {
		return err
	}
	// There is always a block behind the shared xattrs: go-erofs reads them a block
	// at a time, wherever they begin.
	t.dataBlocks = max(t.dataBlocks, 1)
	_, data := t.starts()
	t.stats.Bytes = data + t.dataBlocks*blockSize
	t.shared.count = nil // it has done its work
	return nil
}

// layDir puts what is in directory n into its place.
func (t *Tree) layDir(n int32) error {
	from, to := t.inodes[n].from, t.inodes[n].to
	for i := from; i < to; i++ {
		k := t.dentries[t.kids[i]].inode
		if t.inodes[k].place.pos != 0 {
			continue // "." and "..", and other names of a file
		}
		if t.inodes[k].typ == toc.Directory {
			t.merge(k, n)
		}
		if err := t.put(k); err != nil {
			return err
		}
	}
	t.stats.Entries += int(to-from) - 2
	for i := from; i < to; i++ {
		d := &t.dentries[t.kids[i]]
		if t.inodes[d.inode].typ == toc.Directory && d.name != "." && d.name != ".." {
			if err := t.layDir(d.inode); err != nil {
				return err
			}
		}
	}
	return nil
}

// put gives inode n its place, behind those that have one.
func (t *Tree) put(n int32) error {
	in := &t.inodes[n]
	p := &in.place
	var tail int64 // bytes behind inode and xattrs
	switch in.typ {
	case toc.Directory:
		p.size = t.dirSize(n)
	case toc.Symlink:
		p.size = int64(len(t.entry(n).Link))
	case toc.Regular:
		e := t.entry(n)
		p.size = e.Size
		if t.stats.RegularBytes += e.Size; t.stats.RegularBytes < 0 {
			return fmt.Errorf("layer %d: %q: the image's files have more than 8 EiB", in.layer, e.Name)
		}
		if e.Size > 0 {
			p.layout = layoutChunks
			p.key = int32(len(t.keys))
			t.keys = append(t.keys, toc.ObjectKey(t.layers[in.layer].Content(e)))
			tail = 4 * ((e.Size-1)/chunkSize + 1)
		}
	}
	if err := t.putXattrs(in); err != nil {
		return fmt.Errorf("layer %d: %q: %w", in.layer, in.attr.Name, err)
	}
	head := inodeSize + int64(p.xattrs)
	if in.typ == toc.Directory || in.typ == toc.Symlink {
		blocks := p.size / blockSize
		rest := p.size % blockSize
		switch {
		case rest == 0:
		case rest <= maxInline && head+rest <= blockSize:
			p.layout = layoutInline
			tail = rest
		default:
			blocks++
		}
		p.block = t.dataBlocks
		t.dataBlocks += blocks
	}
	// An inode with all that is behind it lies in one block, so that it costs one
	// read; the kernel requires it of tails.
	p.pos = align(t.metaEnd, nidSize)
	if size := head + tail; p.pos%blockSize+size > blockSize {
		p.pos = align(p.pos, blockSize)
	}
	t.metaEnd = p.pos + head + tail
	t.order = append(t.order, n)
	t.stats.Inodes++
	return nil
}

// putXattrs computes the size of the inode's xattrs.
func (t *Tree) putXattrs(in *inode) error {
	data := in.typ == toc.Regular && in.place.size > 0
	if len(in.xattrs) == 0 && !data {
		return nil
	}
	size, n := int64(xattrHeader), 0
	add := func(x toc.Xattr) {
		if n < xattrMaxShared {
			if _, ok := t.shared.share(x); ok {
				n++
				size += 4
				return
			}
		}
		size += xattrSize(x)
	}
	if data {
		add(metacopy)
		size += align(int64(xattrEntry+len(redirectName)-len("trusted.")+redirectSize), 4)
	}
	for _, x := range in.xattrs {
		add(x)
	}
	if size > maxXattrs {
		return fmt.Errorf("xattrs of %d bytes: at most %d", size, maxXattrs)
	}
	in.place.xattrs = int32(size)
	return nil
}

// dirSize returns the i_size of directory n.
func (t *Tree) dirSize(n int32) int64 {
	var blocks, used int64
	for _, d := range t.kids[t.inodes[n].from:t.inodes[n].to] {
		size := int64(direntSize + len(t.dentries[d].name))
		if used+size > blockSize {
			blocks++
			used = 0
		}
		used += size
	}
	return blocks*blockSize + used
}

// Stats returns what is in the tree and its image.
func (t *Tree) Stats() Stats { return t.stats }

// WriteTo writes the metadata image: the same bytes for the same layers. It returns
// the number of bytes written.
func (t *Tree) WriteTo(w io.Writer) (int64, error) {
	sharedStart, dataStart := t.starts()
	o := &output{w: w, buf: make([]byte, 0, 256<<10)}
	o.pad(superOffset)
	t.writeSuper(o, sharedStart/blockSize)
	for i, n := range t.order {
		if err := o.flush(); err != nil {
			return o.off, err
		}
		in := &t.inodes[n]
		o.pad(in.place.pos)
		t.writeInode(o, n, uint32(i+1), dataStart/blockSize)
	}
	o.pad(sharedStart)
	for _, x := range t.shared.list {
		o.xattr(x)
	}
	for _, n := range t.order {
		if err := o.flush(); err != nil {
			return o.off, err
		}
		in := &t.inodes[n]
		if in.place.size == 0 || in.typ != toc.Directory && in.typ != toc.Symlink {
			continue
		}
		whole := in.place.size
		if in.place.layout == layoutInline {
			whole -= whole % blockSize
		}
		if whole == 0 {
			continue
		}
		o.pad(dataStart + in.place.block*blockSize)
		if in.typ == toc.Symlink {
			o.s(t.entry(n).Link)
		} else {
			t.writeDir(o, n, 0, whole)
		}
	}
	o.pad(t.stats.Bytes)
	o.last = true
	err := o.flush()
	return o.off, err
}

// starts returns where the shared xattrs and the data blocks begin, in bytes of the image.
func (t *Tree) starts() (xattrs, data int64) {
	xattrs = align(t.metaEnd, blockSize)
	return xattrs, align(xattrs+t.shared.size, blockSize)
}

func (t *Tree) writeSuper(o *output, xattrBlock int64) {
	root := t.inodes[t.order[0]].place.pos / nidSize
	// The UUID says which layers the image was made from.
	h := sha256.New()
	for _, l := range t.layers {
		h.Write(l.Digest[:])
	}
	uuid := h.Sum(nil)[:16]
	uuid[6] = uuid[6]&0x0f | 0x80 // RFC 9562: version 8, custom
	uuid[8] = uuid[8]&0x3f | 0x80

	o.u32(superMagic)
	o.u32(0) // checksum: see output.flush
	o.u32(compatChecksum | compatMTime)
	o.u8(blockBits)
	o.u8(0)
	o.u16(uint16(root))
	o.u64(uint64(t.stats.Inodes))
	o.u64(0) // build time
	o.u32(0)
	o.u32(uint32(t.stats.Bytes / blockSize))
	o.u32(0) // meta_blkaddr
	o.u32(uint32(xattrBlock))
	o.b(uuid)
	o.s("lazuli\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")
	o.u32(incompatChunkedFile)
	o.pad(superOffset + superSize)
}

func (t *Tree) writeInode(o *output, n int32, ino uint32, dataBlock int64) {
	in := &t.inodes[n]
	p := &in.place
	icount := 0
	if p.xattrs > 0 {
		icount = (int(p.xattrs)-xattrHeader)/4 + 1
	}
	var u uint32
	switch {
	case in.typ == toc.CharDevice || in.typ == toc.BlockDevice:
		e := t.entry(n)
		u = e.Minor&0xff | e.Major<<8 | e.Minor&^0xff<<12 // new_encode_dev
	case p.layout == layoutChunks:
		u = chunkBits
	case in.typ == toc.Directory || in.typ == toc.Symlink:
		u = uint32(dataBlock + p.block)
	}
	mode := in.attr.Mode & 0o7777
	links := in.links
	switch in.typ {
	case toc.Symlink:
		mode = 0o777
	case toc.Directory:
		links = 1 // what overlayfs says of merged directories
		if !in.merged {
			links = 0
			for _, d := range t.kids[in.from:in.to] {
				if t.inodes[t.dentries[d].inode].typ == toc.Directory {
					links++
				}
			}
		}
	}

	o.u16(extended | uint16(p.layout))
	o.u16(uint16(icount))
	o.u16(uint16(mode) | modes[in.typ].mode)
	o.u16(0)
	o.u64(uint64(p.size))
	o.u32(u)
	o.u32(ino)
	o.u32(in.attr.UID)
	o.u32(in.attr.GID)
	o.u64(uint64(in.attr.MTime))
	o.u32(in.attr.MTimeNsec)
	o.u32(uint32(links))
	o.u64(0)
	o.u64(0)
	if p.xattrs > 0 {
		t.writeXattrs(o, in)
	}
	switch {
	case p.layout == layoutChunks:
		for c := int64(0); c < p.size; c += chunkSize {
			o.u32(nullAddr)
		}
	case p.layout == layoutInline && in.typ == toc.Symlink:
		o.s(t.entry(n).Link)
	case p.layout == layoutInline:
		t.writeDir(o, n, p.size-p.size%blockSize, p.size)
	}
}

// modes are the type bits of i_mode and the types of directory entries.
var modes = [...]struct {
	mode  uint16
	dtype byte
}{
	toc.Regular:     {0o100000, 1},
	toc.Directory:   {0o040000, 2},
	toc.CharDevice:  {0o020000, 3},
	toc.BlockDevice: {0o060000, 4},
	toc.FIFO:        {0o010000, 5},
	toc.Symlink:     {0o120000, 7},
}

// writeXattrs writes what putXattrs has counted.
func (t *Tree) writeXattrs(o *output, in *inode) {
	data := in.typ == toc.Regular && in.place.size > 0
	start := o.at()
	o.u32(0)
	o.u64(0)
	var n byte
	var inline []toc.Xattr
	share := func(x toc.Xattr) {
		if n < xattrMaxShared {
			if id, ok := t.shared.id[x]; ok {
				n++
				o.u32(id)
				return
			}
		}
		inline = append(inline, x)
	}
	if data {
		share(metacopy)
	}
	for _, x := range in.xattrs {
		share(x)
	}
	o.buf[start-o.off+4] = n // h_shared_count
	if data {
		k := &t.keys[in.place.key]
		o.u8(byte(len(redirectName) - len("trusted.")))
		o.u8(4)
		o.u16(uint16(redirectSize))
		o.s(redirectName[len("trusted."):])
		name := hex.EncodeToString(k[:])
		o.s("/" + name[:1] + "/" + name[1:])
		o.pad(align(o.at(), 4))
	}
	for _, x := range inline {
		o.xattr(x)
	}
}

// writeDir writes the bytes of directory n from from, which begins a block, to to, which ends one
// or the directory.
func (t *Tree) writeDir(o *output, n int32, from, to int64) {
	kids := t.kids[t.inodes[n].from:t.inodes[n].to]
	for at := int64(0); at < to; at += blockSize {
		count, names := 0, 0
		for count < len(kids) {
			l := len(t.dentries[kids[count]].name)
			if (count+1)*direntSize+names+l > blockSize {
				break
			}
			count++
			names += l
		}
		if at >= from {
			start := o.at()
			off := count * direntSize
			for _, k := range kids[:count] {
				d := &t.dentries[k]
				in := &t.inodes[d.inode]
				o.u64(uint64(in.place.pos / nidSize))
				o.u16(uint16(off))
				o.u8(modes[in.typ].dtype)
				o.u8(0)
				off += len(d.name)
			}
			for _, k := range kids[:count] {
				o.s(t.dentries[k].name)
			}
			if at+blockSize <= to {
				o.pad(start + blockSize)
			}
		}
		kids = kids[count:]
	}
}

// output is a buffered writer that knows how far it is. The superblock is in its first
// buffer, and gets its checksum there.
type output struct {
	w    io.Writer
	buf  []byte
	off  int64 // bytes written, without those in buf
	last bool
}

func (o *output) at() int64    { return o.off + int64(len(o.buf)) }
func (o *output) u8(v byte)    { o.buf = append(o.buf, v) }
func (o *output) u16(v uint16) { o.buf = binary.LittleEndian.AppendUint16(o.buf, v) }
func (o *output) u32(v uint32) { o.buf = binary.LittleEndian.AppendUint32(o.buf, v) }
func (o *output) u64(v uint64) { o.buf = binary.LittleEndian.AppendUint64(o.buf, v) }
func (o *output) b(p []byte)   { o.buf = append(o.buf, p...) }
func (o *output) s(p string)   { o.buf = append(o.buf, p...) }

// pad writes zeros up to the offset to.
func (o *output) pad(to int64) {
	for n := to - o.at(); n > 0; n = to - o.at() {
		o.b(zeros[:min(n, blockSize)])
	}
}

var zeros [blockSize]byte

// xattr writes one entry.
func (o *output) xattr(x toc.Xattr) {
	index, rest, _ := namespace(x.Name)
	o.u8(byte(len(rest)))
	o.u8(index)
	o.u16(uint16(len(x.Value)))
	o.s(rest)
	o.s(x.Value)
	o.pad(align(o.at(), 4))
}

// flush writes the buffer out when it is full, or last.
func (o *output) flush() error {
	if len(o.buf) < 192<<10 && !o.last {
		return nil
	}
	if o.off == 0 {
		// The kernel's crc32c has no final inversion, and covers the rest of the
		// block with the checksum itself zero.
		sum := ^crc32.Checksum(o.buf[superOffset:blockSize], crc32.MakeTable(crc32.Castagnoli))
		binary.LittleEndian.PutUint32(o.buf[superOffset+4:], sum)
	}
	n, err := o.w.Write(o.buf)
	o.off += int64(n)
	o.buf = o.buf[:0]
	return err
}
