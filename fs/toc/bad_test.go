package toc

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// sha is a digest as JSON has it.
const sha = `"sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"`

// badJSON are tables of contents that are what the manifest promises and yet no
// layer's. The key is what the error says.
var badJSON = []struct{ index, want string }{
	{`{`, `unexpected EOF`},
	{``, `unexpected EOF`},
	{`[]`, `want {`},
	{`null`, `want {`},
	{`{"version":1}`, `want version and entries`},
	{`{"entries":[]}`, `want version and entries`},
	{`{"version":2,"entries":[]}`, `not lazy: the table of contents is of version 2`},
	{`{"version":1,"version":1,"entries":[]}`, `given twice`},
	{`{"version":1,"entries":[],"entries":[]}`, `given twice`},
	{`{"version":1,"entries":[]}{}`, `more than one JSON value`},
	{`{"version":1,"entries":[]} x`, `invalid character 'x'`},
	{`{"version":1,"entries":{}}`, `want [`},
	{`{"version":1,"entries":[3]}`, `entry 0: want {`},
	{row1(`"type":"reg"`), `no name`},
	{row1(`"name":"a"`), `entry "a": no type`},
	{row1(`"name":"a","type":"reg","type":"dir"`), `entry "a": type: given twice`},
	{row1(`"name":"a","type":"socket"`), `entry "a": type: "socket": not known`},
	{row1(`"name":"a","type":7`), `entry "a": type: want a string`},
	{row1(`"name":{},"type":"dir"`), `name: want a string`},
	{row1(`"name":"a` + "\xff" + `","type":"dir"`), `invalid UTF-8`},
	{row1(`"name":"a\ud800","type":"dir"`), `invalid`},
	// Names.
	{row1(`"name":"","type":"dir"`), `empty name`},
	{row1(`"name":"../etc/passwd","type":"dir"`), `entry "../etc/passwd": name: ".." in it`},
	{row1(`"name":"/a/../b","type":"dir"`), `entry "/a/../b": name: ".." in it`},
	{row1(`"name":"a/..","type":"dir"`), `".." in it`},
	{row1(`"name":"a\u0000b","type":"dir"`), `NUL`},
	{row1(`"name":"/","type":"symlink","linkName":"x"`), `the root is not a directory`},
	{row1(`"name":"` + strings.Repeat("n", 256) + `","type":"dir"`), `an element of 256 bytes`},
	{row1(`"name":"` + strings.Repeat("n/", 2048) + `n","type":"dir"`), `4097 bytes, at most 4095`},
	{row1(`"name":"a","nameBytes":"Li4=","type":"dir"`), `".." in it`},
	{row1(`"name":"a","nameBytes":"!","type":"dir"`), `entry "a": nameBytes: illegal base64`},
	{row1("\"name\":\"lost \uFFFD\",\"type\":\"dir\""), `not lazy: name is not UTF-8`},
	{row1(`"name":"l","type":"symlink"`), `symlink to 0 bytes`},
	{row1(`"name":"l","type":"symlink","linkName":"\u0000"`), `symlink: NUL`},
	{row1(`"name":"l","type":"symlink","linkName":"` + strings.Repeat("n/", 2048) + `"`), `symlink to 4096 bytes`},
	{row1("\"name\":\"l\",\"type\":\"symlink\",\"linkName\":\"\uFFFD\""), `not lazy: link is not UTF-8`},
	{row1(`"name":"h","type":"hardlink","linkName":"../x"`), `entry "h": hard link to "../x": ".." in it`},
	{row1(`"name":"h","type":"hardlink","linkName":"/"`), `hard link to the root`},
	{row1(`"name":"h","type":"hardlink"`), `hard link to the root`},
	// Numbers.
	{row1(`"name":"a","type":"reg","size":9223372036854775808`), `entry "a": size: 9223372036854775808: want an integer below 2^63`},
	{row1(`"name":"a","type":"reg","size":1e3`), `size: 1e3: want an integer`},
	{row1(`"name":"a","type":"reg","size":-1`), `entry "a": size -1`},
	{row1(`"name":"a","type":"reg","size":"1"`), `size: want a number`},
	{row1(`"name":"a","type":"dir","uid":4294967295`), `entry "a": uid 4294967295: out of range`},
	{row1(`"name":"a","type":"dir","gid":-1`), `gid -1: out of range`},
	{row1(`"name":"a","type":"char","devMajor":4096`), `device 4096:0: out of range`},
	{row1(`"name":"a","type":"block","devMinor":-1`), `device 0:-1: out of range`},
	{row1(`"name":"a","type":"dir","modtime":"yesterday"`), `entry "a": modtime: `},
	{row1(`"name":"a","type":"dir","modtime":"0000-01-01T00:00:00+23:00"`), `not in the years 0 to 9999`},
	// Chunks.
	{row1(`"type":"chunk","offset":1,"chunkSize":1`), `a chunk of no file`},
	{rows(`"name":"a","type":"dir"`, `"type":"chunk","offset":1,"chunkSize":1,"chunkDigest":`+sha), `a chunk of no file`},
	{row1(`"name":"a","type":"reg","size":2,"offset":1,"chunkSize":1,"chunkDigest":` + sha), `entry "a": chunks of 1 bytes for a file of 2`},
	{rows(`"name":"a","type":"reg","size":2,"offset":1,"chunkSize":1,"chunkDigest":`+sha, `"name":"b","type":"dir"`), `entry "a": chunks of 1 bytes for a file of 2`},
	{rows(`"name":"a","type":"reg","size":3,"offset":1,"chunkSize":1,"chunkDigest":`+sha, `"type":"chunk","chunkOffset":2,"chunkSize":1,"chunkDigest":`+sha), `entry "a": chunk at byte 2 of the file, want 1`},
	{rows(`"name":"a","type":"reg","size":3,"offset":1,"chunkSize":2,"chunkDigest":`+sha, `"type":"chunk","chunkOffset":1,"chunkSize":2,"chunkDigest":`+sha), `entry "a": chunk at byte 1 of the file, want 2`},
	{rows(`"name":"a","type":"reg","size":3,"offset":1,"chunkSize":3,"chunkDigest":`+sha, `"type":"chunk","chunkOffset":3,"chunkSize":1,"chunkDigest":`+sha), `entry "a": chunk of 1 bytes at byte 3 of a file of 3`},
	{rows(`"name":"a","type":"reg","size":0`, `"type":"chunk","chunkSize":1,"chunkDigest":`+sha), `entry "a": chunk of 1 bytes at byte 0 of a file of 0`},
	{row1(`"name":"a","type":"reg","size":2,"chunkSize":3,"digest":` + sha), `chunk of 3 bytes`},
	{row1(`"name":"a","type":"reg","size":2,"chunkSize":-2,"digest":` + sha), `chunk of -2 bytes`},
	{row1(`"name":"a","type":"reg","size":9223372036854775807,"chunkSize":9223372036854775807,"chunkOffset":9223372036854775807,"digest":` + sha), `chunk at byte 9223372036854775807 of the file, want 0`},
	{row1(`"name":"a","type":"reg","size":2,"chunkOffset":-1,"digest":` + sha), `chunk at byte -1 of the file`},
	{row1(`"name":"a","type":"reg","size":2,"offset":1000,"digest":` + sha), `entry "a": chunk at byte 1000 of the blob, whose files end at 1000`},
	{row1(`"name":"a","type":"reg","size":2,"offset":9223372036854775807,"digest":` + sha), `chunk at byte 9223372036854775807 of the blob`},
	{row1(`"name":"a","type":"reg","size":2,"offset":-1,"digest":` + sha), `chunk at byte -1 of the blob`},
	{row1(`"name":"a","type":"reg","size":2,"innerOffset":-1,"digest":` + sha), `chunk at byte -1 of its member`},
	{row1(`"name":"a","type":"reg","size":2,"innerOffset":67108865,"digest":` + sha), `not lazy: a chunk at byte 67108865 of its member`},
	{row1(`"name":"a","type":"reg","size":67108865,"digest":` + sha), `not lazy: a chunk of 67108865 bytes`},
	{row1(`"name":"a","type":"reg","size":2`), `not lazy: the chunk at byte 0 has no digest`},
	{rows(`"name":"a","type":"reg","size":2,"chunkSize":1,"digest":`+sha, `"type":"chunk","chunkOffset":1,"chunkSize":1`), `not lazy: the chunk at byte 0 has no digest`},
	{row1(`"name":"a","type":"reg","size":2,"digest":"sha512:00"`), `entry "a": digest: digest "sha512:00"`},
	{row1(`"name":"a","type":"reg","size":2,"chunkDigest":"sha256:2cf2"`), `entry "a": chunkDigest: digest "sha256:2cf2"`},
	{row1(`"name":"a","type":"reg","size":2,"chunkType":"delta","digest":` + sha), `chunkType: "delta": not known`},
	{rows(`"name":"a","type":"reg","size":9223372036854775807,"chunkType":"zeros"`, `"name":"b","type":"reg","size":1,"digest":`+sha), `entry "b": sizes add up to more than 2^63 bytes`},
	// Xattrs.
	{row1(`"name":"a","type":"dir","xattrs":{"trusted.overlay.redirect":"Lw=="}`), `entry "a": xattr "trusted.overlay.redirect": overlayfs's own`},
	{row1(`"name":"a","type":"reg","xattrs":{"user.overlay.metacopy":""}`), `entry "a": xattr "user.overlay.metacopy": overlayfs's own`},
	{row1(`"name":"a","type":"dir","xattrsBytes":{"dHJ1c3RlZC5vdmVybGF5Lm9wYXF1ZQ==":"eQ=="}`), `xattr "trusted.overlay.opaque": overlayfs's own`},
	{row1(`"name":"a","type":"dir","xattrs":{"user.a":"","user.a":""}`), `xattr "user.a": given twice`},
	{row1(`"name":"a","type":"dir","xattrs":{"user.a":""},"xattrsBytes":{"dXNlci5h":""}`), `xattr "user.a": given twice`},
	{row1(`"name":"a","type":"dir","xattrs":{"":""}`), `entry "a": : want a name`},
	{row1(`"name":"a","type":"dir","xattrs":{"user.\u0000":""}`), `without NUL`},
	{row1(`"name":"a","type":"dir","xattrs":{"` + strings.Repeat("x", 256) + `":""}`), `want a name of 1 to 255 bytes`},
	{row1(`"name":"a","type":"dir","xattrs":{"user.a":"?"}`), `entry "a": user.a: illegal base64`},
	{row1(`"name":"a","type":"dir","xattrs":{"user.a":"` + strings.Repeat("AAAA", 22000) + `"}`), `at most 65536 bytes of xattrs`},
	{row1(`"name":"a","type":"dir","xattrs":[]`), `xattrs: want {`},
	// What fills memory or stacks.
	{row1(`"name":"` + strings.Repeat("n", 2<<20) + `","type":"dir"`), `a value of more than 1048576 bytes`},
	{row1(`"unknown":"` + strings.Repeat("n", 2<<20) + `"`), `a value of more than 1048576 bytes`},
	{row1(`"unknown":` + strings.Repeat("[", 100000)), `exceeded max depth`},
	{`{"version":1,"entries":` + strings.Repeat(`{"a":`, 100000), `want [`},
}

func row1(fields string) string { return rows(fields) }

func rows(fields ...string) string {
	return `{"version":1,"entries":[{` + strings.Join(fields, "},{") + `}]}`
}

func TestParseErrors(t *testing.T) {
	for _, tt := range badJSON {
		got, err := parseJSON(t, tt.index)
		if err == nil {
			t.Errorf("%.200s: no error, want %s", tt.index, tt.want)
			continue
		}
		if got != nil || !strings.HasPrefix(err.Error(), "toc: ") || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%.200s:\n got %v\nwant %s", tt.index, err, tt.want)
		}
		if want := strings.Contains(tt.want, "not lazy"); errors.Is(err, ErrNotLazy) != want {
			t.Errorf("%.200s: %v: is ErrNotLazy: %v", tt.index, err, !want)
		}
		if len(err.Error()) > 2000 {
			t.Errorf("%.200s: error of %d bytes", tt.index, len(err.Error()))
		}
		// The same from bytes that nobody promised is a matter of the bytes alone.
		packed := gzipTOC(t, tt.index)
		loc := Location{Compression: Gzip, Size: int64(len(packed)), DataEnd: 1000}
		_, err = Parse(bytes.NewReader(packed), loc, Promise{Digest: Digest{1}})
		if err == nil || !strings.Contains(err.Error(), "the manifest says sha256:01") {
			t.Errorf("%.200s: %v, want another digest", tt.index, err)
		}
	}
}

// Fields that nobody wrote when this was, and null, are not in the way.
func TestParseTolerates(t *testing.T) {
	toc, err := parseJSON(t, `{"tarSplitDigest":"x","version":1,"entries":[{"xattrs":null,"later":{"a":[1,{}]},"NAME":"x","name":"a","type":"dir","modtime":"","userName":"root","endOffset":5,"uid":null}]}`+"\n ")
	if err != nil {
		t.Fatal(err)
	}
	if len(toc.Entries) != 1 || toc.Entries[0].Name != "a" {
		t.Errorf("%+v", toc.Entries)
	}
	if toc, err = parseJSON(t, `{"version":1,"entries":null}`); err != nil || len(toc.Entries) != 0 {
		t.Errorf("%+v, %v", toc, err)
	}
}

func TestLandmarks(t *testing.T) {
	reg := func(name string, offset int) string {
		return fmt.Sprintf(`"name":%q,"type":"reg","size":1,"offset":%d,"chunkDigest":%s`, name, offset, sha)
	}
	for _, tt := range []struct {
		index   string
		end     int64
		entries int
	}{
		{rows(reg("a", 1), reg(PrefetchLandmark, 500), reg("b", 600)), 500, 2},
		{rows(reg(NoPrefetchLandmark, 1), reg("b", 600)), 0, 1},
		{rows(reg(NoPrefetchLandmark, 1), reg(PrefetchLandmark, 500)), 0, 0},
		{rows(reg("./"+PrefetchLandmark, 1000)), 1000, 0},
		{rows(reg(PrefetchLandmark, 1001)), 0, 0}, // not in the blob
		{rows(reg("a/"+PrefetchLandmark, 500)), 0, 1},
		{rows(reg(TarName, 500), reg("a", 1)), 0, 1},
	} {
		toc, err := parseJSON(t, tt.index)
		if err != nil {
			t.Errorf("%s: %v", tt.index, err)
			continue
		}
		if toc.PrefetchEnd != tt.end || len(toc.Entries) != tt.entries || len(toc.Chunks) != tt.entries {
			t.Errorf("%s: prefetch to %d, %d entries, %d chunks", tt.index, toc.PrefetchEnd, len(toc.Entries), len(toc.Chunks))
		}
	}
}

// Bytes that are cut, changed or of another kind.
func TestParseBytes(t *testing.T) {
	index := rows(`"name":"a","type":"reg","size":5,"digest":` + sha)
	for i, packed := range [][]byte{gzipTOC(t, index), zstdTOC(index)} {
		loc := Location{Compression: Compression(i + 1), Size: int64(len(packed)), DataEnd: 1000}
		inflated := Promise{Digest: sha256.Sum256([]byte(index))}
		compressed := Promise{Digest: sha256.Sum256(packed), Compressed: true}
		for _, want := range []Promise{inflated, compressed} {
			r := bytes.NewReader(append(packed[:len(packed):len(packed)], "more"...))
			toc, err := Parse(r, loc, want)
			if err != nil {
				t.Fatal(err)
			}
			if r.Len() != len("more") {
				t.Errorf("%d bytes left, want those that follow the table", r.Len())
			}
			if toc.Digest != inflated.Digest {
				t.Errorf("digest %s", toc.Digest)
			}
			for n := range packed {
				if _, err := Parse(bytes.NewReader(packed[:n]), loc, want); err == nil {
					t.Errorf("%d bytes of %d: no error", n, len(packed))
				}
				flipped := bytes.Clone(packed)
				flipped[n] ^= 0x10
				toc, err := Parse(bytes.NewReader(flipped), loc, want)
				if err == nil && (want.Compressed || toc.Digest != inflated.Digest) {
					t.Errorf("byte %d flipped: no error", n)
				}
			}
		}
		other := loc
		other.Compression = 3 - loc.Compression
		if _, err := Parse(bytes.NewReader(packed), other, inflated); err == nil {
			t.Error("gzip read as zstd, or the other way: no error")
		}
		other.Compression = Whole
		if _, err := Parse(bytes.NewReader(packed), other, inflated); err == nil {
			t.Error("a whole layer has no table of contents: no error")
		}
	}
	if _, err := Parse(bytes.NewReader(nil), Location{Compression: Gzip, Size: 10}, Promise{}); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("nothing: %v", err)
	}
}

func zstdTOC(index string) []byte {
	var b bytes.Buffer
	z, _ := zstd.NewWriter(&b)
	io.WriteString(z, index)
	z.Close()
	return b.Bytes()
}

// spaces is n spaces, which JSON may have anywhere.
type spaces int64

func (s *spaces) Read(p []byte) (int, error) {
	n := min(int64(len(p)), int64(*s))
	if n == 0 {
		return 0, io.EOF
	}
	for i := range p[:n] {
		p[i] = ' '
	}
	*s -= spaces(n)
	return int(n), nil
}

// What would be 2 GiB of JSON is given up at MaxInflated, and as a layer that is not lazy.
func TestTooLarge(t *testing.T) {
	if testing.Short() {
		t.Skip("inflates 1 GiB")
	}
	var b bytes.Buffer
	z, _ := zstd.NewWriter(&b, zstd.WithEncoderLevel(zstd.SpeedFastest))
	entry := []byte(`{"type":"dir","name":"a","later":"` + strings.Repeat("x", 100000) + `"},`)
	io.WriteString(z, `{"version":1,"entries":[`)
	for n := 0; n < MaxInflated+MaxInflated/16; n += len(entry) {
		z.Write(entry)
	}
	z.Close()
	_, err := Parse(&b, Location{Compression: Zstd, Size: int64(b.Len()), DataEnd: 1}, Promise{})
	if !errors.Is(err, ErrNotLazy) || !strings.Contains(err.Error(), "more than 1073741824 bytes") {
		t.Error(err)
	}
	// A tar says so in its header.
	b.Reset()
	g, _ := gzip.NewWriterLevel(&b, 1)
	s := spaces(4096)
	io.WriteString(g, tarHeader(TarName, 10<<30))
	io.Copy(g, &s)
	g.Close()
	_, err = Parse(&b, Location{Compression: Gzip, Size: int64(b.Len()), DataEnd: 1}, Promise{})
	if !errors.Is(err, ErrNotLazy) {
		t.Error(err)
	}
}

// tarHeader is the header of a regular file in the form of GNU, which has room for any size.
func tarHeader(name string, size int64) string {
	h := make([]byte, 512)
	copy(h, name)
	copy(h[100:], "0000644\x000000000\x000000000\x00")
	h[124] = 0x80
	binary.BigEndian.PutUint64(h[128:], uint64(size))
	copy(h[136:], "00000000000\x00        0")
	copy(h[257:], "ustar  \x00")
	sum := 0
	for _, c := range h {
		sum += int(c)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	return string(h)
}

func TestTooMany(t *testing.T) {
	if testing.Short() {
		t.Skip("parses 3 million entries")
	}
	repeat := func(first, more string, n int) error {
		r, w := io.Pipe()
		go func() {
			z, _ := zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedFastest))
			io.WriteString(z, `{"version":1,"entries":[`+first)
			buf := []byte(strings.Repeat(more, 1000))
			for range n / 1000 {
				if _, err := z.Write(buf); err != nil {
					break
				}
			}
			io.WriteString(z, `]}`)
			w.CloseWithError(z.Close())
		}()
		defer r.Close()
		json, _, done, err := inflate(r, Location{Compression: Zstd})
		if err != nil {
			t.Fatal(err)
		}
		defer done()
		return newParser(json, Location{DataEnd: 1}, 0).toc()
	}
	err := repeat(`{"type":"dir","name":"a"}`, `,{"type":"dir","name":"a"}`, MaxEntries+1000)
	if !errors.Is(err, ErrNotLazy) || !strings.Contains(err.Error(), "more than 2097152 entries") {
		t.Error(err)
	}
	err = repeat(`{"type":"reg","name":"a","size":9223372036854775807,"chunkSize":1,"chunkType":"zeros"}`, `,{"type":"dir","name":"a"}`, 1000)
	if err == nil || !strings.Contains(err.Error(), "chunks of 1 bytes for a file of 9223372036854775807") {
		t.Error(err)
	}
}

func TestPromised(t *testing.T) {
	d := Digest{1}
	for _, tt := range []struct {
		annotations map[string]string
		want        Promise
		lazy        bool
		bad         bool
	}{
		{nil, Promise{}, false, true},
		{map[string]string{PositionAnnotation: "1:2:3"}, Promise{}, false, true},
		{map[string]string{DigestAnnotation: d.String()}, Promise{Digest: d}, true, false},
		{map[string]string{PodmanChecksumAnnotation: d.String()}, Promise{d, true}, true, false},
		{map[string]string{ZstdChecksumAnnotation: d.String()}, Promise{d, true}, true, false},
		{map[string]string{ZstdChecksumAnnotation: Digest{2}.String(), DigestAnnotation: d.String()}, Promise{Digest: d}, true, false},
		{map[string]string{DigestAnnotation: "sha512:00"}, Promise{}, true, true},
		{map[string]string{DigestAnnotation: ""}, Promise{}, true, true},
	} {
		got, err := Promised(tt.annotations)
		if got != tt.want || (err != nil) != tt.bad || errors.Is(err, ErrNotLazy) == tt.lazy {
			t.Errorf("%v: %v, %v", tt.annotations, got, err)
		}
	}
}

func TestLocate(t *testing.T) {
	const size = 1000
	ours, theirs := PositionAnnotation, PodmanPositionAnnotation
	for _, tt := range []struct {
		key, value string
		want       Location
		ok         bool // else an error
	}{
		{ours, "900:49:3000", Location{Gzip, 900, 49, 900, 3000}, true},
		{ours, "0:1000:0", Location{Gzip, 0, 1000, 0, 0}, true},
		{theirs, "900:28:300:1", Location{Zstd, 900, 28, 892, 300}, true},
		{ZstdPositionAnnotation, "8:1:0:1", Location{Zstd, 8, 1, 0, 0}, true},
		{theirs, "900:28:300:2", Location{}, false},
		{theirs, "900:28:300", Location{}, false},
		{theirs, "7:28:300:1", Location{}, false},
		{ours, "900:101:3", Location{}, false},
		{ours, "1000:1:3", Location{}, false},
		{ours, "1001:1:3", Location{}, false},
		{ours, "900:0:3", Location{}, false},
		{ours, "900:49:1073741825", Location{}, false},
		{ours, "-1:49:3", Location{}, false},
		{ours, "900:49", Location{}, false},
		{ours, "900:49:3:1", Location{}, false},
		{ours, "", Location{}, false},
		{ours, " 900:49:3", Location{}, false},
		{ours, "9223372036854775808:1:3", Location{}, false},
		{ours, "18446744073709551615:2:3", Location{}, false},
		{ours, "900:18446744073709551615:3", Location{}, false},
		{ours, "18446744073709551616:2:3", Location{}, false},
	} {
		got, ok, err := Locate(map[string]string{tt.key: tt.value}, size)
		if got != tt.want || ok != tt.ok || (err == nil) != tt.ok {
			t.Errorf("%s=%s: %+v, %v, %v", tt.key, tt.value, got, ok, err)
		}
		if err != nil && !strings.Contains(err.Error(), tt.key) {
			t.Errorf("%s=%s: %v: does not name the annotation", tt.key, tt.value, err)
		}
	}
	if _, ok, err := Locate(map[string]string{DigestAnnotation: "x"}, size); ok || err != nil {
		t.Error(ok, err)
	}
}

func zstdFooter(magic string, n int, numbers ...uint64) []byte {
	p := make([]byte, n)
	for i, v := range numbers {
		binary.LittleEndian.PutUint64(p[8*i:], v)
	}
	copy(p[n-8:], magic)
	return append(binary.LittleEndian.AppendUint32([]byte(skippable), uint32(n)), p...)
}

func estargzFooter(offset string) []byte {
	return append([]byte(gzipHeader+"\x00\x00\x00\x00\x00\xff"+extraStargz+offset+stargzMagic), gzipEmpty...)
}

var footers = []struct {
	footer []byte
	want   Location // of a blob of 1000 bytes
	err    string
}{
	{estargzFooter("0000000000000064"), Location{Compression: Gzip, Offset: 100, Size: 849, DataEnd: 100}, ""},
	{legacyFooter(100), Location{Compression: Gzip, Offset: 100, Size: 853, DataEnd: 100}, ""},
	{zstdFooter(zstdMagic, 40, 100, 20, 30, 1), Location{Zstd, 100, 20, 92, 30}, ""},
	{zstdFooter(podmanMagic, 64, 100, 20, 30, 1, 128, 9, 9), Location{Zstd, 100, 20, 92, 30}, ""},
	{append([]byte(gzipHeader+"\x00\x00\x00\x00\x00\xff"+extraExternal), gzipEmpty...), Location{}, "not lazy: the table of contents is not in the blob"},
	{nil, Location{}, "not lazy: the blob has no footer"},
	{estargzFooter("00000000000003b5"), Location{}, "footer: table of contents at byte 949 of a blob of 1000"},
	{estargzFooter("7fffffffffffffff"), Location{}, "footer: table of contents at byte"},
	{estargzFooter("8000000000000000"), Location{}, "footer: table of contents at byte"},
	{estargzFooter("ffffffffffffffff"), Location{}, "footer: table of contents at byte"},
	{estargzFooter("-000000000000001"), Location{}, `footer: offset "-000000000000001"`},
	{estargzFooter("0x00000000000064"), Location{}, `footer: offset "0x00000000000064"`},
	{estargzFooter("+000000000000064"), Location{}, `footer: offset "+000000000000064"`},
	{zstdFooter(zstdMagic, 40, 100, 20, 30, 2), Location{}, "not lazy: table of contents of type 2"},
	{zstdFooter(zstdMagic, 40, 7, 20, 30, 1), Location{}, "footer: table of contents at byte 7"},
	{zstdFooter(zstdMagic, 40, 100, 853, 30, 1), Location{}, "footer: table of contents of 853 bytes at byte 100 of 952"},
	{zstdFooter(zstdMagic, 40, 100, 0, 30, 1), Location{}, "footer: table of contents of 0 bytes"},
	{zstdFooter(zstdMagic, 40, 100, math.MaxUint64, 30, 1), Location{}, "footer: table of contents of 18446744073709551615 bytes"},
	{zstdFooter(zstdMagic, 40, math.MaxUint64, 1, 30, 1), Location{}, "footer: table of contents of 1 bytes"},
	{zstdFooter(zstdMagic, 40, 1<<63, 1<<63, 30, 1), Location{}, "footer: table of contents of 9223372036854775808 bytes"},
	{zstdFooter(zstdMagic, 40, 100, 20, 10<<30, 1), Location{}, "footer: not lazy: table of contents of 10737418240 bytes"},
	{zstdFooter("GnUlinux", 40, 100, 20, 30, 1), Location{}, "not lazy: the blob has no footer"},
	{zstdFooter(zstdMagic, 48, 100, 20, 30, 1), Location{}, "not lazy: the blob has no footer"},
}

func TestParseFooter(t *testing.T) {
	for _, tt := range footers {
		blob := append(make([]byte, 1000-len(tt.footer)), tt.footer...)
		for _, tail := range []int{FooterSize, 500, 1000} {
			got, err := ParseFooter(blob[1000-tail:], 1000)
			if got != tt.want || (err == nil) != (tt.err == "") {
				t.Errorf("%q: %+v, %v", tt.footer, got, err)
			} else if err != nil && (!strings.Contains(err.Error(), tt.err) || errors.Is(err, ErrNotLazy) != strings.Contains(tt.err, "not lazy")) {
				t.Errorf("%q: %v, want %s", tt.footer, err, tt.err)
			}
		}
		// Alone it points out of the blob.
		if _, err := ParseFooter(tt.footer, int64(len(tt.footer))); err == nil {
			t.Errorf("%q: no error", tt.footer)
		}
		for i := range tt.footer { // must not panic, whatever is cut
			ParseFooter(tt.footer[i:], int64(len(tt.footer)-i))
		}
	}
	if _, err := ParseFooter(make([]byte, 51), 1000); err == nil || errors.Is(err, ErrNotLazy) {
		t.Errorf("a tail that is too short to tell: %v", err)
	}
	if _, err := ParseFooter(make([]byte, 51), 50); err == nil {
		t.Error("a tail larger than the blob: no error")
	}
}
