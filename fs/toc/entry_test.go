package toc

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestEntryFromHeader(t *testing.T) {
	h := tar.Header{
		Typeflag: tar.TypeReg, Name: "./a//b/./c", Linkname: "ignored", Size: 7, Mode: 0o104755, Uid: 1, Gid: math.MaxUint32 - 1,
		Uname: "root", ModTime: time.Unix(-2, 999999999), Devmajor: 99999,
		PAXRecords: map[string]string{"SCHILY.xattr.user.z": "1", "SCHILY.xattr.user.a": "\x00", "mtime": "0"},
	}
	want := Entry{
		Name: "a/b/c", Type: Regular, Size: 7, Mode: 0o4755, UID: 1, GID: math.MaxUint32 - 1, MTime: -2, MTimeNsec: 999999999,
		Xattrs: []Xattr{{"user.a", "\x00"}, {"user.z", "1"}},
	}
	got, err := EntryFromHeader(&h)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for name, want := range map[string]string{
		"a": "a", "/a": "a", "a/": "a", "./a": "a", "//a//b//": "a/b", "/": "", ".": "", "./": "", "./.": "", "...": "...", "..a/b..": "..a/b..",
		"a/./": "a", "\xff": "\xff", " ": " ",
	} {
		e, err := EntryFromHeader(&tar.Header{Typeflag: tar.TypeDir, Name: name})
		if err != nil || e.Name != want {
			t.Errorf("%q: %q, %v, want %q", name, e.Name, err, want)
		}
	}
	for _, tt := range []struct {
		typ  byte
		name string
		want Type
		size int64
	}{
		{tar.TypeGNUSparse, "s", Regular, 9}, {0, "old", Regular, 9}, {0, "old/", Directory, 0}, {tar.TypeDir, "d", Directory, 0}, {tar.TypeFifo, "p", FIFO, 0},
	} {
		e, err := EntryFromHeader(&tar.Header{Typeflag: tt.typ, Name: tt.name, Size: 9})
		if err != nil || e.Type != tt.want || e.Size != tt.size || e.MTime != 0 {
			t.Errorf("%q: %+v, %v", tt.typ, e, err)
		}
	}
}

var badHeaders = []struct {
	h    tar.Header
	want string
}{
	{tar.Header{Typeflag: tar.TypeReg, Name: "../x"}, `entry "../x": name: ".." in it`},
	{tar.Header{Typeflag: tar.TypeReg, Name: "a/../../x"}, `".." in it`},
	{tar.Header{Typeflag: tar.TypeReg, Name: ".."}, `".." in it`},
	{tar.Header{Typeflag: tar.TypeReg}, `entry "": empty name`},
	{tar.Header{Typeflag: tar.TypeReg, Name: "/"}, `the root is not a directory`},
	{tar.Header{Typeflag: tar.TypeReg, Name: "a\x00"}, `NUL`},
	{tar.Header{Typeflag: tar.TypeReg, Name: strings.Repeat("a/", 2100)}, `4199 bytes`},
	{tar.Header{Typeflag: tar.TypeReg, Name: "a", Size: -1}, `entry "a": size -1`},
	{tar.Header{Typeflag: tar.TypeReg, Name: "a", Uid: -1}, `entry "a": uid -1: out of range`},
	{tar.Header{Typeflag: tar.TypeReg, Name: "a", Gid: math.MaxUint32}, `entry "a": gid 4294967295: out of range`},
	{tar.Header{Typeflag: tar.TypeReg, Name: "a", ModTime: time.Unix(maxTime+1, 0)}, `not in the years 0 to 9999`},
	{tar.Header{Typeflag: tar.TypeChar, Name: "a", Devmajor: 4096}, `device 4096:0: out of range`},
	{tar.Header{Typeflag: tar.TypeBlock, Name: "a", Devminor: 1 << 20}, `device 0:1048576: out of range`},
	{tar.Header{Typeflag: tar.TypeSymlink, Name: "a"}, `symlink to 0 bytes`},
	{tar.Header{Typeflag: tar.TypeLink, Name: "a", Linkname: "/../etc/shadow"}, `entry "a": hard link to "/../etc/shadow": ".." in it`},
	{tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "pax_global_header"}, `tar type 'g' makes no file`},
	{tar.Header{Typeflag: tar.TypeCont, Name: "a"}, `tar type '7' makes no file`},
	{tar.Header{Typeflag: tar.TypeReg, Name: "a", PAXRecords: map[string]string{"SCHILY.xattr.trusted.overlay.redirect": "/x"}}, `entry "a": xattr "trusted.overlay.redirect"`},
	{tar.Header{Typeflag: tar.TypeReg, Name: "a", PAXRecords: map[string]string{"SCHILY.xattr.user.overlay.metacopy": ""}}, `entry "a": xattr "user.overlay.metacopy"`},
	{tar.Header{Typeflag: tar.TypeReg, Name: "a", PAXRecords: map[string]string{"SCHILY.xattr.": ""}}, `want a name of 1 to 255 bytes`},
	{tar.Header{Typeflag: tar.TypeReg, Name: "a", PAXRecords: map[string]string{"SCHILY.xattr.user.a": strings.Repeat("x", MaxXattrs)}}, `more than 65536 bytes of xattrs`},
}

func TestEntryFromHeaderErrors(t *testing.T) {
	for _, tt := range badHeaders {
		if _, err := EntryFromHeader(&tt.h); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%.100q: %v, want %s", tt.h.Name, err, tt.want)
		}
	}
}

func TestFromTar(t *testing.T) {
	files := worst()
	files = append(files, file{tar.Header{Typeflag: tar.TypeReg, Name: "./" + NoPrefetchLandmark}, "\x0f"}, file{tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "git"}}, ""})
	data := append(makeTar(t, files), make([]byte, 10240)...) // padded, as GNU tar does
	files = files[:len(files)-2]
	contents := make(map[Digest]string)
	var chunks []Chunk
	toc, err := FromTar(iotest.OneByteReader(bytes.NewReader(data)), 7000, func(c Chunk, p []byte) error {
		contents[c.Digest] = string(p)
		chunks = append(chunks, c)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if want := Digest(sha256.Sum256(data)); toc.Digest != want || toc.Compression != Whole {
		t.Errorf("digest %s of compression %d, want %s", toc.Digest, toc.Compression, want)
	}
	if diff := cmp.Diff(toc.Chunks, chunks); diff != "" {
		t.Error(diff)
	}
	check(t, toc, nil, files)
	for i, e := range toc.Entries {
		var got string
		for _, c := range toc.Content(&e) {
			if c.FileOffset != int64(len(got)) || c.Member != 0 || c.Inner != 0 || sha256.Sum256([]byte(contents[c.Digest])) != c.Digest || int64(len(contents[c.Digest])) != c.Size {
				t.Errorf("%s: %+v", e.Name, c)
			}
			got += contents[c.Digest]
		}
		if e.Type == Regular && got != files[i].data {
			t.Errorf("%s: content differs", e.Name)
		}
	}
	stop := errors.New("disk full")
	if _, err := FromTar(bytes.NewReader(data), 7000, func(Chunk, []byte) error { return stop }); err != stop {
		t.Errorf("%v, want %v", err, stop)
	}
	for _, size := range []int64{0, -1, MaxChunkSize + 1} {
		if _, err := FromTar(bytes.NewReader(data), size, nil); err == nil {
			t.Errorf("chunks of %d bytes: no error", size)
		}
	}
}

// empties is a tar of n empty files.
type empties struct {
	h []byte
	n int64
}

func (e *empties) Read(p []byte) (int, error) {
	if len(p) < 512 || e.n == 0 {
		return 0, io.EOF
	}
	e.n--
	return copy(p, e.h), nil
}

func TestFromTarTooMany(t *testing.T) {
	if testing.Short() {
		t.Skip("reads 2 million entries")
	}
	_, err := FromTar(&empties{[]byte(tarHeader("a", 0)), 10e6}, 1000, discard)
	if err == nil || !strings.Contains(err.Error(), "more than 2097152 entries") {
		t.Error(err)
	}
}

// A tar that ends in a file, or in the middle of a header, is not a layer.
func TestFromTarTruncated(t *testing.T) {
	data := makeTar(t, []file{{tar.Header{Typeflag: tar.TypeReg, Name: "a"}, strings.Repeat("x", 1000)}})
	for _, n := range []int{1, 511, 513, 512 + 999} {
		_, err := FromTar(bytes.NewReader(data[:n]), 100, discard)
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
	if _, err := FromTar(io.MultiReader(bytes.NewReader(data), iotest.ErrReader(io.ErrClosedPipe)), 100, discard); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("error after the end of the tar: %v", err)
	}
}

func discard(Chunk, []byte) error { return nil }

const sparseSize = 1<<20 + 8

// sparseTars are sparse files as GNU tar writes them, the older way and the newer: 4
// bytes, a megabyte of nothing, 4 bytes.
func sparseTars() map[string][]byte {
	old := []byte(tarHeader("old", 8))
	old[156] = 'S'
	copy(old[386:], fmt.Sprintf("%011o\x00%011o\x00%011o\x00%011o\x00", 0, 4, 1<<20+4, 4))
	copy(old[483:], fmt.Sprintf("%011o\x00", sparseSize))
	old = append(rehash(old), pad("headtail")...)
	records := ""
	for _, kv := range []string{"GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=new", fmt.Sprint("GNU.sparse.realsize=", sparseSize)} {
		records += fmt.Sprintf("%d %s\n", len(kv)+4, kv)
	}
	pax := []byte(tarHeader("PaxHeaders/new", int64(len(records))))
	pax[156] = 'x'
	copy(pax[257:], "ustar\x0000")
	h := []byte(tarHeader("GNUSparseFile.1/new", 520))
	copy(h[257:], "ustar\x0000")
	parts := [][]byte{rehash(pax), pad(records), rehash(h), pad(fmt.Sprintf("2\n0\n4\n%d\n4\n", 1<<20+4)), pad("headtail")}
	return map[string][]byte{"old": old, "new": bytes.Join(parts, nil)}
}

func TestFromTarSparse(t *testing.T) {
	for name, data := range sparseTars() {
		var got strings.Builder
		toc, err := FromTar(bytes.NewReader(append(data, make([]byte, 1024)...)), 1000, func(_ Chunk, p []byte) error {
			got.Write(p)
			return nil
		})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if len(toc.Entries) != 1 || toc.Entries[0].Name != name || toc.Entries[0].Size != sparseSize || toc.Entries[0].Type != Regular {
			t.Errorf("%s: %+v", name, toc.Entries)
		}
		if want := "head" + strings.Repeat("\x00", 1<<20) + "tail"; got.String() != want {
			t.Errorf("%s: content of %d bytes, want %d", name, got.Len(), len(want))
		}
	}
}

func pad(s string) []byte {
	b := make([]byte, (len(s)+511)/512*512)
	copy(b, s)
	return b
}

func rehash(h []byte) []byte {
	copy(h[148:], "        ")
	sum := 0
	for _, c := range h {
		sum += int(c)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	return h
}

func TestParseDigest(t *testing.T) {
	d := Digest(sha256.Sum256([]byte("x")))
	if got, err := ParseDigest(d.String()); got != d || err != nil {
		t.Error(got, err)
	}
	for _, s := range []string{"", "sha256:", d.String()[:70], d.String() + "0", strings.ToUpper(d.String()), "sha256:" + strings.ToUpper(hex.EncodeToString(d[:])), "sha512:" + d.String()[7:], "sha256:" + strings.Repeat("g", 64)} {
		got, err := ParseDigest(s)
		if err == nil || !got.IsZero() {
			t.Errorf("%q: %v", s, got)
		}
		var p Digest
		if s != "" && parseDigest(&p, []byte(s)) == nil {
			t.Errorf("%q in JSON: no error", s)
		}
	}
}
