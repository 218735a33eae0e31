package meta

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"io/fs"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/erofs/go-erofs"

	"lazuli/fs/toc"
)

// source takes values from the fuzzer's bytes; behind their end everything is zero.
type source struct{ b []byte }

func (s *source) n(max int) int {
	if len(s.b) == 0 {
		return 0
	}
	v := int(s.b[0])
	s.b = s.b[1:]
	return v % max
}

func (s *source) u64() uint64 {
	var b [8]byte
	s.b = s.b[copy(b[:], s.b):]
	return binary.LittleEndian.Uint64(b[:])
}

func (s *source) text() string {
	n := min(s.n(64), len(s.b))
	t := string(s.b[:n])
	s.b = s.b[n:]
	return t
}

// fuzzNames make collisions likely.
var fuzzNames = []string{
	"", "a", "b", "a/b", "a/b/c", "b/a", ".wh.a", "a/.wh.b", ".wh..wh..opq", "a/.wh..wh..opq", "..", "a/../b", "/a", "a//b", "a/", ".",
	"../../etc", "/", ".wh.", ".wh...", "c/.wh..wh.x", strings.Repeat("x", 255), strings.Repeat("x", 256), strings.Repeat("y/", 40) + "z", strings.Repeat("y/", 2048) + "z",
}

var fuzzXattrs = []toc.Xattr{
	{Name: "user.a", Value: "b"}, {Name: "security.capability", Value: capValue}, {Name: "trusted.overlay.redirect", Value: "/x"},
	{Name: "user.overlay.metacopy"}, {Name: aclAccess, Value: "\x02\x00\x00\x00"}, {Name: aclDefault, Value: "x"}, {Name: "user."},
}

// fuzzLayers makes layers of the fuzzer's bytes.
func fuzzLayers(b []byte) (layers []*toc.TOC) {
	s := &source{b}
	name := func() string {
		if i := s.n(len(fuzzNames) + 8); i < len(fuzzNames) {
			return fuzzNames[i]
		}
		return s.text()
	}
	for len(s.b) > 0 {
		l := &toc.TOC{}
		for range s.n(16) {
			e := toc.Entry{Name: name(), Type: toc.Type(s.n(9)), Mode: uint32(s.n(256)) << 4}
			switch e.Type {
			case toc.Symlink, toc.Hardlink:
				e.Link = name()
			case toc.CharDevice, toc.BlockDevice:
				e.Major, e.Minor = uint32(s.n(2)), uint32(s.n(2))
			case toc.Regular:
				switch s.n(4) {
				case 1:
					e.Size, e.FirstChunk, e.NumChunks = int64(s.u64()), uint32(s.u64()), uint32(s.u64())
				case 2, 3:
					e.FirstChunk = uint32(len(l.Chunks))
					for range s.n(3) {
						size := s.u64() >> s.n(64)
						l.Chunks = append(l.Chunks, toc.Chunk{FileOffset: e.Size, Size: int64(size), Digest: sha256.Sum256(s.b)})
						e.Size += int64(size)
						e.NumChunks++
					}
				}
			}
			if s.n(4) == 1 {
				e.UID, e.GID, e.MTime, e.MTimeNsec = uint32(s.u64()), uint32(s.u64()), int64(s.u64()), uint32(s.u64())
			}
			for range s.n(3) {
				if i := s.n(len(fuzzXattrs) + 3); i < len(fuzzXattrs) {
					e.Xattrs = append(e.Xattrs, fuzzXattrs[i])
				} else {
					e.Xattrs = append(e.Xattrs, toc.Xattr{Name: s.text(), Value: s.text()})
				}
			}
			l.Entries = append(l.Entries, e)
		}
		layers = append(layers, l)
		if len(layers) == 4 {
			break
		}
	}
	return layers
}

// FuzzBuild: whatever the layers say, there is an error or an image that can be read, is not
// larger than its names explain, has no name that leads out of it and no xattr of overlayfs but its own.
func FuzzBuild(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte("\x02\x01\x02\x00\x00\x00\x03\x01\x10\x02\x01\x05\x00\x00"))
	for i := range fuzzNames { // each name as a directory, a file, and a link to "a"
		f.Add([]byte{3, 1, 1, 0, 0, 0, 0, byte(i), 2, 0, 0, 0, byte(i), 4, 0, 1, 0, 0})
		f.Add([]byte{2, byte(i), 3, 0, 1, 0, 0, 3, 1, 0, 0, 0, 0, 1, byte(i), 2, 0, 0, 0})
	}
	f.Add([]byte{1, 1, 1, 0, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f, 0, 0, 0, 0, 0, 0, 0, 0, 1}) // size 2^63-1
	f.Add([]byte{2, 1, 4, 0, 2, 0, 0, 2, 4, 0, 1, 0, 0})                                                    // hard links in a circle
	f.Add([]byte{3, 1, 3, 0, 2, 0, 0, 2, 3, 0, 1, 0, 0, 3, 2, 0, 0, 0})                                     // symlinks in a circle
	for i := range fuzzXattrs {
		f.Add([]byte{1, 1, 1, 0, 0, 0, 1, byte(i)})
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		layers := fuzzLayers(b)
		var image bytes.Buffer
		stats, err := Build(&image, layers)
		if err != nil {
			return
		}
		if stats.Bytes != int64(image.Len()) || stats.Bytes > 1<<20+int64(len(b))*8192*4 {
			t.Fatalf("image of %d bytes, Stats %+v", image.Len(), stats)
		}
		var again bytes.Buffer
		if _, err := Build(&again, layers); err != nil || !bytes.Equal(image.Bytes(), again.Bytes()) {
			t.Fatalf("another image from the same layers, %v", err)
		}
		img, err := erofs.Open(bytes.NewReader(image.Bytes()))
		if err != nil {
			t.Fatal(err)
		}
		keys := map[string]bool{}
		for _, l := range layers {
			for i := range l.Entries {
				if e := &l.Entries[i]; uint64(e.FirstChunk)+uint64(e.NumChunks) <= uint64(len(l.Chunks)) {
					keys[redirect(toc.ObjectKey(l.Content(e)))] = true
				}
			}
		}
		names := 0
		err = fs.WalkDir(img, ".", func(name string, d fs.DirEntry, err error) error {
			if err != nil {
				t.Fatalf("%q: %v", name, err)
			}
			names++
			if base := path.Base(name); name != "." && (base != d.Name() || base == ".." || len(base) > maxName || slices.Contains(strings.Split(name, "/"), "..")) {
				t.Fatalf("name %q", name)
			}
			fi, err := d.Info()
			if err != nil {
				t.Fatalf("%q: %v", name, err)
			}
			st := fi.Sys().(*erofs.Stat)
			for k, v := range st.Xattrs {
				switch {
				case k == redirectName && fi.Mode().IsRegular() && keys[v]:
				case k == metacopy.Name && fi.Mode().IsRegular() && v == "":
				case strings.Contains(k, ".overlay."):
					t.Fatalf("%q: xattr %s=%q", name, k, v)
				}
			}
			if st.Mode&fs.ModeCharDevice != 0 && st.Rdev == 0 {
				t.Fatalf("%q: a whiteout", name)
			}
			if st.Nlink < 1 {
				t.Fatalf("%q: %d links", name, st.Nlink)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if names != stats.Entries+1 {
			t.Fatalf("%d names, Stats %+v", names, stats)
		}
	})
}
