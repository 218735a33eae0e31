package store

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMain is also the second process of the tests that need one.
func TestMain(m *testing.M) {
	if dir := os.Getenv("STORE_TEST_PARTIAL"); dir != "" {
		halfAnObject(dir)
	}
	os.Exit(m.Run())
}

// halfAnObject puts the first of two chunks, says so, and waits to be killed.
func halfAnObject(dir string) {
	s, err := Open(dir, nil)
	if err == nil {
		var p *Partial
		if p, err = s.OpenPartial(key("two"), 8, 2); err == nil {
			_, err = p.Put(0, []byte("ABCD"), 0)
		}
	}
	fmt.Println(err)
	io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

func key(s string) Key { return Key(sha256.Sum256([]byte(s))) }

func open(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// tempDir is a folder in memory, if there is such a thing: a busy disk takes seconds for an fsync.
func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "lazuli-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func read(t *testing.T, s *Store, k Key) string {
	t.Helper()
	f, err := s.OpenObject(k)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func names(t *testing.T, s *Store, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(s.Path(dir))
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return all
}

func openPartial(t *testing.T, s *Store, name string, size int64, n int) *Partial {
	t.Helper()
	p, err := s.OpenPartial(key(name), size, n)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func put(t *testing.T, p *Partial, i int, b string, off int64) bool {
	t.Helper()
	complete, err := p.Put(i, []byte(b), off)
	if err != nil {
		t.Fatal(err)
	}
	return complete
}

func TestPut(t *testing.T) {
	s := open(t, tempDir(t))
	defer s.Close()
	k := key("a")
	if _, err := s.OpenObject(k); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("an object that is not here: %v", err)
	}
	if err := s.Put(k, []byte("content")); err != nil {
		t.Fatal(err)
	}
	if got := read(t, s, k); !s.Has(k) || got != "content" {
		t.Fatalf("has %v, content %q", s.Has(k), got)
	}
	fi, err := os.Stat(filepath.Join(s.Objects(), k.Path()))
	if err != nil || fi.Mode().Perm()&0o222 != 0 {
		t.Fatalf("an object is read-only: %v %v", fi.Mode(), err)
	}
	// The inode that overlayfs has resolved stays.
	if err := s.Put(k, []byte("content")); err != nil {
		t.Fatal(err)
	}
	again, err := os.Stat(filepath.Join(s.Objects(), k.Path()))
	if err != nil || !os.SameFile(fi, again) {
		t.Fatalf("a second Put replaced the object: %v", err)
	}
	if left := names(t, s, "tmp"); len(left) > 0 {
		t.Errorf("left in tmp: %v", left)
	}
}

func TestTempHoles(t *testing.T) {
	s := open(t, tempDir(t))
	defer s.Close()
	temp, err := s.Create()
	if err != nil {
		t.Fatal(err)
	}
	defer temp.Discard()
	if err := temp.WriteHole(3); err != nil {
		t.Fatal(err)
	}
	temp.Write([]byte("x"))
	if err := temp.WriteHole(2); err != nil {
		t.Fatal(err)
	}
	if err := temp.Publish(key("h")); err != nil {
		t.Fatal(err)
	}
	if got := read(t, s, key("h")); got != "\x00\x00\x00x\x00\x00" {
		t.Fatalf("%q", got)
	}
}

// TestAdopt: a file from elsewhere becomes an object like any other, or stays what it is.
func TestAdopt(t *testing.T) {
	dir := tempDir(t)
	s := open(t, filepath.Join(dir, "store"))
	defer s.Close()
	from, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	file := func(name, content string) *os.File {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o666); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, 0o6755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Setxattr(path, "user.x", []byte("x"), 0); err != nil && !errors.Is(err, unix.ENOTSUP) {
			t.Fatal(err)
		}
		if os.Geteuid() == 0 {
			if err := os.Chown(path, 5, 6); err != nil {
				t.Fatal(err)
			}
			if err := unix.Setxattr(path, "trusted.overlay.redirect", []byte("/etc"), 0); err != nil {
				t.Fatal(err)
			}
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	adopt := func(f *os.File, name string) *Temp {
		t.Helper()
		temp, err := s.Adopt(f, int(from.Fd()), name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Lstat(filepath.Join(dir, name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is still there: %v", name, err)
		}
		if _, err := temp.Write([]byte("more")); err == nil {
			t.Error("an adopted file can be written to")
		}
		return temp
	}

	temp := adopt(file("a", "A"), "a")
	if err := temp.Publish(key("a")); err != nil {
		t.Fatal(err)
	}
	temp.Discard()
	if got := read(t, s, key("a")); got != "A" {
		t.Errorf("object is %q", got)
	}
	path := s.Path("objects", key("a").Path())
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	n, err := unix.Listxattr(path, nil)
	if st.Mode != unix.S_IFREG|0o444 || int(st.Uid) != os.Geteuid() || int(st.Gid) != os.Getegid() || n != 0 || err != nil {
		t.Errorf("object has mode %o, owner %d:%d, %d bytes of xattrs, %v", st.Mode, st.Uid, st.Gid, n, err)
	}

	adopt(file("b", "B"), "b").Discard()

	temp = adopt(file("c", "another A"), "c") // the object that is there stays
	if err := temp.Publish(key("a")); err != nil {
		t.Fatal(err)
	}
	temp.Discard()
	if got := read(t, s, key("a")); got != "A" {
		t.Errorf("object is %q", got)
	}

	linked := file("d", "D")
	if err := os.Link(filepath.Join(dir, "d"), filepath.Join(dir, "d2")); err != nil {
		t.Fatal(err)
	}
	e := file("e", "E")
	file("f", "F")
	for _, test := range []struct {
		f          *os.File
		name, want string
	}{
		{linked, "d", "not a regular file with one name"},
		{from, "store", "not a regular file with one name"},
		{e, "gone", "no such file"},
		{e, "f", "another file took its place"},
	} {
		if _, err := s.Adopt(test.f, int(from.Fd()), test.name); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("Adopt %s: %v, want %q", test.name, err, test.want)
		}
	}
	if left := names(t, s, "tmp"); len(left) > 0 {
		t.Errorf("left in tmp: %v", left)
	}
}

func TestWriteFile(t *testing.T) {
	s := open(t, tempDir(t))
	defer s.Close()
	failed := errors.New("failed")
	err := s.WriteFile(func(f *os.File) error { f.WriteString("half"); return failed }, "meta", "x")
	if _, statErr := os.Stat(s.Path("meta", "x")); err != failed || !errors.Is(statErr, fs.ErrNotExist) {
		t.Fatalf("a file whose writer failed: %v, %v", err, statErr)
	}
	if left := names(t, s, "tmp"); len(left) > 0 {
		t.Errorf("left in tmp: %v", left)
	}
}

func TestPartial(t *testing.T) {
	dir := tempDir(t)
	s := open(t, dir)
	p := openPartial(t, s, "three", 9, 3)
	if put(t, p, 2, "CCC", 6) || put(t, p, 2, "CCC", 6) || p.Has(0) || !p.Has(2) {
		t.Fatal("one of three chunks is in, twice")
	}
	b := make([]byte, 3)
	if _, err := p.ReadAt(b, 6); err != nil || string(b) != "CCC" {
		t.Fatalf("a chunk that is in: %q, %v", b, err)
	}
	if got := s.Here(key("three"), 9); got == 0 {
		t.Error("nothing here of an object with a chunk that is in")
	}
	if err := errors.Join(p.Close(), s.Close()); err != nil {
		t.Fatal(err)
	}

	s = open(t, dir) // another run of the program
	defer s.Close()
	p = openPartial(t, s, "three", 9, 3)
	defer p.Close()
	if p.Has(0) || p.Has(1) || !p.Has(2) || p.Complete() {
		t.Fatal("what was in is not in any more, or too much is")
	}
	put(t, p, 1, "BBB", 3)
	if s.Has(key("three")) {
		t.Fatal("published before the last chunk")
	}
	if !put(t, p, 0, "AAA", 0) || !p.Complete() {
		t.Fatal("the last chunk does not complete the object")
	}
	if got := read(t, s, key("three")); got != "AAABBBCCC" {
		t.Fatalf("content %q", got)
	}
	if left := names(t, s, "partial"); len(left) > 0 {
		t.Errorf("left in partial: %v", left)
	}
	fi, _ := os.Stat(filepath.Join(s.Objects(), key("three").Path()))
	if fi.Mode().Perm()&0o222 != 0 {
		t.Errorf("an object is read-only: %v", fi.Mode())
	}
}

// One caller of many sees the last chunk.
func TestPartialConcurrent(t *testing.T) {
	const n = 200
	s := open(t, tempDir(t))
	defer s.Close()
	p := openPartial(t, s, "many", n, n)
	defer p.Close()
	var completed sync.Map
	var all sync.WaitGroup
	for g := range 4 {
		all.Go(func() {
			for i := range n {
				c := (i*7 + g*50) % n
				complete, err := p.Put(c, []byte{byte(c)}, int64(c))
				if err != nil {
					t.Error(err)
				}
				if complete {
					completed.Store([2]int{g, i}, true)
				}
			}
		})
	}
	all.Wait()
	count := 0
	completed.Range(func(any, any) bool { count++; return true })
	if got := read(t, s, key("many")); count != 1 || len(got) != n || got[123] != 123 {
		t.Fatalf("completed %d times, %d bytes", count, len(got))
	}
}

// A map without its file is about a file that is gone: the object was published, and then removed.
func TestPartialStaleMap(t *testing.T) {
	s := open(t, tempDir(t))
	defer s.Close()
	p := openPartial(t, s, "two", 8, 2)
	put(t, p, 0, "ABCD", 0)
	p.Close()
	if err := os.Remove(s.Path("partial", key("two").String())); err != nil {
		t.Fatal(err)
	}
	p = openPartial(t, s, "two", 8, 2)
	defer p.Close()
	if p.Has(0) {
		t.Fatal("a chunk of a file that is gone counts as in: readers get zeros")
	}
}

// The owner was killed between the last chunk and the rename.
func TestPartialUnpublished(t *testing.T) {
	s := open(t, tempDir(t))
	defer s.Close()
	p := openPartial(t, s, "two", 8, 2)
	put(t, p, 0, "ABCD", 0)
	put(t, p, 1, "EFGH", 4)
	p.Close()
	name := s.Path("partial", key("two").String())
	if err := os.Rename(filepath.Join(s.Objects(), key("two").Path()), name); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name+".in", []byte{1, 0, 0, 0, 0, 0, 0, 0}, 0o600); err != nil {
		t.Fatal(err)
	}
	p = openPartial(t, s, "two", 8, 2)
	defer p.Close()
	if got := read(t, s, key("two")); !p.Complete() || got != "ABCDEFGH" {
		t.Fatalf("complete %v, content %q", p.Complete(), got)
	}
}

// A map that says more than there can be, or that ends within an entry, is no reason to fail.
func TestPartialDamagedMap(t *testing.T) {
	s := open(t, tempDir(t))
	defer s.Close()
	p := openPartial(t, s, "two", 8, 2)
	put(t, p, 0, "ABCD", 0)
	p.Close()
	name := s.Path("partial", key("two").String()) + ".in"
	if err := os.WriteFile(name, []byte{0xff, 0xff, 0xff, 0xff, 1}, 0o600); err != nil {
		t.Fatal(err)
	}
	p = openPartial(t, s, "two", 8, 2)
	defer p.Close()
	if p.Has(0) || p.Has(1) {
		t.Fatal("chunks are in that the map does not name")
	}
	put(t, p, 0, "ABCD", 0)
	if !put(t, p, 1, "EFGH", 4) {
		t.Fatal("not complete")
	}
}

// Two processes complete one object, each in a file of its own.
func TestPartialTwice(t *testing.T) {
	s := open(t, tempDir(t))
	defer s.Close()
	a, b := openPartial(t, s, "two", 8, 2), openPartial(t, s, "two", 8, 2)
	put(t, a, 0, "ABCD", 0)
	if b.Has(0) {
		t.Fatal("two owners of one file")
	}
	put(t, b, 1, "EFGH", 4)
	if !put(t, b, 0, "ABCD", 0) || !put(t, a, 1, "EFGH", 4) {
		t.Fatal("not complete")
	}
	if got := read(t, s, key("two")); got != "ABCDEFGH" {
		t.Fatalf("content %q", got)
	}
	if err := errors.Join(a.Close(), b.Close()); err != nil {
		t.Fatal(err)
	}
	if left := append(names(t, s, "partial"), names(t, s, "tmp")...); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// Another process is killed in the middle of an object: this one waits for nothing, and goes on where it was.
func TestPartialKilled(t *testing.T) {
	dir := tempDir(t)
	s := open(t, dir)
	defer s.Close()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "STORE_TEST_PARTIAL="+dir)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 64)
	n, _ := out.Read(line)
	if got := strings.TrimSpace(string(line[:n])); got != "<nil>" {
		t.Fatalf("the other process: %s", got)
	}

	mine := openPartial(t, s, "two", 8, 2) // the other one has it
	if mine.Has(0) {
		t.Error("a file that another process writes is shared")
	}
	mine.Close()
	// Nobody cleans up while the other lives.
	other := open(t, dir)
	other.Close()
	cmd.Process.Kill()
	cmd.Wait()

	p := openPartial(t, s, "two", 8, 2)
	defer p.Close()
	if !p.Has(0) || p.Has(1) {
		t.Fatal("what the killed process had is lost")
	}
	if !put(t, p, 1, "EFGH", 4) || read(t, s, key("two")) != "ABCDEFGH" {
		t.Fatal("not completed")
	}
}

func TestTmpIsEmptied(t *testing.T) {
	dir := tempDir(t)
	s := open(t, dir)
	temp, err := s.Create()
	if err != nil {
		t.Fatal(err)
	}
	temp.f.Close() // and killed
	second := open(t, dir)
	if left := names(t, s, "tmp"); len(left) != 1 {
		t.Fatalf("tmp while another process lives: %v", left)
	}
	second.Close()
	s.Close()
	s = open(t, dir)
	defer s.Close()
	if left := names(t, s, "tmp"); len(left) != 0 {
		t.Fatalf("tmp after all died: %v", left)
	}
}

// reboot makes the store look as if the machine had stopped, and everything since the given time may be lost.
func reboot(t *testing.T, dir string, until time.Time) {
	t.Helper()
	b, _ := json.Marshal(syncPoint{Boot: "another", Until: until})
	if err := os.WriteFile(filepath.Join(dir, "synced"), b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestPowerCut(t *testing.T) {
	dir := tempDir(t)
	fill := func() {
		s := open(t, dir)
		defer s.Close()
		if err := s.Put(key("old"), []byte("old")); err != nil {
			t.Fatal(err)
		}
		p := openPartial(t, s, "two", 8, 2)
		defer p.Close()
		put(t, p, 0, "ABCD", 0)
		if err := s.WriteFile(func(f *os.File) error { return nil }, "meta", "m"); err != nil {
			t.Fatal(err)
		}
	}
	fill()
	reboot(t, dir, time.Now().Add(time.Hour))
	s := open(t, dir)
	if !s.Has(key("old")) || len(names(t, s, "partial")) != 2 || len(names(t, s, "meta")) != 1 {
		t.Fatal("what was on disk is gone")
	}
	s.Close()
	reboot(t, dir, time.Now())
	s = open(t, dir)
	if s.Has(key("old")) || len(names(t, s, "partial")) != 0 || len(names(t, s, "meta")) != 0 {
		t.Fatal("what may not have reached the disk is believed")
	}
	s.Close()
	// The same kernel: nothing is lost by a process that was killed.
	fill()
	s = open(t, dir)
	if !s.Has(key("old")) {
		t.Fatal("gone without a power cut")
	}
	s.Close()
	os.WriteFile(filepath.Join(dir, "synced"), []byte("\x00\x00"), 0o600)
	s = open(t, dir)
	defer s.Close()
	if s.Has(key("old")) {
		t.Fatal("believed, although nothing says what is on disk")
	}
}

func TestSync(t *testing.T) {
	s := open(t, tempDir(t))
	defer s.Close()
	begin := time.Now()
	if err := s.Put(key("a"), []byte("a")); err != nil {
		t.Fatal(err)
	}
	if !s.dirty.Swap(false) {
		t.Fatal("a new object need not be synced")
	}
	if err := s.sync(); err != nil {
		t.Fatal(err)
	}
	if s.dirty.Load() {
		t.Error("a sync makes work for the next one")
	}
	var p syncPoint
	b, _ := os.ReadFile(s.Path("synced"))
	if err := json.Unmarshal(b, &p); err != nil || p.Boot != bootID() || p.Until.Before(begin) {
		t.Fatalf("%s: %v", b, err)
	}
}

func TestPrune(t *testing.T) {
	s := open(t, tempDir(t))
	defer s.Close()
	for _, name := range []string{"keep", "drop"} {
		if err := s.Put(key(name), bytes.Repeat([]byte(name), 10000)); err != nil {
			t.Fatal(err)
		}
		p := openPartial(t, s, name+" half", 8, 2)
		put(t, p, 0, "ABCD", 0)
		p.Close()
	}
	os.WriteFile(filepath.Join(s.Objects(), "00", "not an object"), nil, 0o600)
	freed, err := s.Prune(func(k Key) bool { return k == key("keep") || k == key("keep half") })
	if err != nil || freed < 40000 {
		t.Fatalf("freed %d bytes: %v", freed, err)
	}
	if !s.Has(key("keep")) || s.Has(key("drop")) {
		t.Error("the wrong object was removed")
	}
	for _, name := range names(t, s, "partial") {
		if !strings.HasPrefix(name, key("keep half").String()) {
			t.Errorf("left in partial: %s", name)
		}
	}
	if len(names(t, s, "partial")) != 2 {
		t.Error("a partial object that is needed was removed")
	}
}

// A full disk is an error of one Put; what was in stays right.
func TestFull(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to mount a small tmpfs")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Skipf("cannot mount a tmpfs: %v", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	s := open(t, dir)
	defer s.Close()
	const chunk = 64 << 10
	p := openPartial(t, s, "big", 10*chunk, 10)
	defer p.Close()
	var full error
	in := 0
	for i := range 10 {
		b := bytes.Repeat([]byte{byte('a' + i)}, chunk)
		if _, err := p.Put(i, b, int64(i)*chunk); err != nil {
			full = err
			if p.Has(i) {
				t.Fatalf("chunk %d counts as in: %v", i, err)
			}
			continue
		}
		in++
	}
	if !errors.Is(full, syscall.ENOSPC) || in == 0 || p.Complete() {
		t.Fatalf("%d chunks fit: %v", in, full)
	}
	if err := s.Put(key("other"), make([]byte, 4*chunk)); !errors.Is(err, syscall.ENOSPC) || s.Has(key("other")) {
		t.Fatalf("an object that does not fit: %v", err)
	}
	if left := names(t, s, "tmp"); len(left) > 0 {
		t.Errorf("left in tmp: %v", left)
	}
	b := make([]byte, chunk)
	if _, err := p.ReadAt(b, 0); err != nil || !bytes.Equal(b, bytes.Repeat([]byte("a"), chunk)) {
		t.Fatalf("what was in: %v", err)
	}
}
