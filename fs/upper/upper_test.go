package upper

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"lazuli/fs/toc"
	"lazuli/integration"
)

// TestCommit does things in a mount and has the layer made of them show the same. The kernel of this machine decides what
// the upper directory holds then.
func TestCommit(t *testing.T) {
	for _, test := range []struct {
		name   string
		script string
		// objects is how many the store has more than before: metadata moves no data.
		objects int
		// links says that hard links went to another layer than the file below, and so are counted anew.
		links bool
	}{
		{name: "nothing"},
		{name: "create", script: "echo new > new; mkdir -m 2775 n; echo in > n/f; : > n/empty; head -c 400000 /dev/urandom > n/large", objects: 3},
		{name: "overwrite", script: "echo longer than before > d/one; echo more >> d/large; : > d/chunk", objects: 2},
		{name: "write in the middle", script: "printf X | dd of=d/large bs=1 seek=200000 conv=notrunc status=none", objects: 1},
		{name: "same content", script: "cp d/large copy; echo same > s1; echo same > s2", objects: 1},
		{name: "delete", script: "rm d/one; rm -r d/sub; rm d/symlink d/null d/fifo"},
		{name: "delete a long name", script: "rm lll*"},
		{name: "delete all", script: "rm -r *"},
		{name: "delete and make again", script: "rm d/one; mkdir d/one; echo f > d/one/f; rm -r d/sub; echo file > d/sub", objects: 2},
		{name: "recreate a directory", script: "rm -r d/sub; mkdir d/sub; echo f > d/sub/new; mkdir d/sub/deep", objects: 1},
		{name: "attributes of a directory", script: "chmod 711 d; chown 5:6 e; touch -d '2001-01-01 01:01:01.987654321' d/sub"},
		{name: "attributes of a file", script: "chmod 755 d/one; chown 5:6 d/large; touch -d '1960-01-01 01:01:01.5' d/chunk; chmod 2711 d/setuid d/empty; chown 9 d/xattrs"},
		{name: "attributes then data", script: "chmod 600 d/one; echo x >> d/one; chmod 640 d/one", objects: 1},
		{name: "attributes of the root", script: "chmod 700 .; chown 3:4 ."},
		{name: "attributes of a symlink", script: "chown -h 5:6 d/symlink; touch -h -d 2002-02-02 d/symlink"},
		{name: "rename a file", script: "mv d/one d/uno; mv d/large e/large; mv e/large e/larger; mv d/empty empty; mv d/symlink s; mv d/xattrs x"},
		{name: "rename over a file", script: "mv d/one d/chunk; mv -f top e/x"},
		{name: "swap files", script: "mv d/one t; mv d/chunk d/one; mv t d/chunk"},
		{name: "rename a file then write", script: "mv d/large d/l; echo x >> d/l; mv d/one d/1; : > d/1", objects: 1},
		{name: "rename a directory", script: "mv d/sub d/bus"},
		{name: "rename elsewhere", script: "mv d/sub e/sub; mv e f"},
		{name: "rename and back", script: "mv d/sub s; mv s d/sub"},
		{name: "swap directories", script: "mv d t; mv e d; mv t e"},
		{name: "rename over a directory", script: "mkdir d/new; mv -T d/sub/deep d/new; rm -r e/*; mv -T d/sub e"},
		{name: "change what was renamed", script: "mv d/sub s; echo n > s/n; rm s/a; chmod 600 s/b; mv s/deep/c s/deep/cc; rm -r s/deep; mkdir s/deep; echo x > s/deep/x; chmod 700 s", objects: 2},
		{name: "rename inside renamed", script: "mv d dd; mv dd/sub dd/bus; mv dd/bus/deep deep; mv deep/c dd/bus/c; chmod 600 deep/d; mv dd/one one; mkdir dd/sub; echo 1 > dd/sub/1", objects: 1},
		{name: "renamed into new", script: "mkdir -p n/m; mv d n/m/d; mv n/m/d/sub n/m/sub; mv n/m/sub/deep n/m/d/sub; mv n o; chmod 600 o/m/sub/a"},
		{name: "delete in renamed", script: "mv d x; rm -r x/sub x/one; rm x/link1", links: true},
		{name: "new where renamed was", script: "mv d x; mkdir d; mkdir d/sub; echo new > d/sub/a; chmod 600 x/sub/a", objects: 1},
		{name: "copies in renamed", script: "mv d x; mkdir x/sub/deep/new; mv x/large x/sub/deep/new/; chmod 600 x/sub/deep/c"},
		{name: "hard links", script: "echo 1 > 1; ln 1 2; ln 1 e/3; ln -s 1 4; ln 4 d/5; mkfifo f1; ln f1 f2; : > z1; ln z1 z2", objects: 1},
		{name: "hard links to lower files", script: "ln d/one d/eins; ln d/eins e/uno; ln d/large top2; chmod 600 top2", links: true},
		{name: "hard links renamed", script: "mv d x"},
		{name: "break hard links", script: "chmod 600 d/link1; echo x >> d/link2", objects: 1, links: true},
		{name: "files of all types", script: "mknod c c 1 5; mknod b b 7 200; mkfifo -m 640 p; ln -s /nowhere/at/all s; ln -s $(head -c 4000 /dev/zero | tr '\\0' x) ls; chmod 4755 c"},
		{name: "sparse", script: "truncate -s 3M s0; truncate -s 1000001 s1; echo end >> s1; printf x | dd of=s2 bs=1 seek=700000 status=none; truncate -s 2000003 s2; cp --sparse=never s2 s3", objects: 3},
		{name: "names", script: `echo 1 > ' '; echo 2 > 'a
b'; echo 3 > "$(printf '\377\376')"; mkdir -- -d; echo 4 > -- -d/x; echo 5 > '...'; echo 6 > .w; echo 7 > wh.; echo 8 > '%s\'`, objects: 8},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorldIn(t, memory(t))
			w.add(t, base())
			w.mount(t, true)
			run(t, "umask 022; cd "+w.mnt+"; "+test.script)
			before := w.objects(t)
			w.commit(t, func(d integration.Difference) bool {
				return test.links && (d.Field == "nlink" || d.Field == "first")
			})
			if n := len(w.objects(t)) - len(before); n != test.objects {
				t.Errorf("%d new objects, want %d", n, test.objects)
			}
			if t.Failed() {
				t.Log(w.log.String())
			}
		})
	}
}

// TestXattrs: those of files are kept, those of overlayfs are not.
func TestXattrs(t *testing.T) {
	w := newWorldIn(t, memory(t))
	w.add(t, base())
	w.mount(t, true)
	set := func(name, xattr, value string) {
		t.Helper()
		must(t, unix.Lsetxattr(filepath.Join(w.mnt, name), xattr, []byte(value), 0))
	}
	const (
		capability = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
		// user::rw-, user:1:rwx, group::r--, mask::rwx, other::---
		acl = "\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x02\x00\x07\x00\x01\x00\x00\x00\x04\x00\x04\x00\xff\xff\xff\xff\x10\x00\x07\x00\xff\xff\xff\xff\x20\x00\x00\x00\xff\xff\xff\xff"
	)
	must(t, os.WriteFile(filepath.Join(w.mnt, "new"), []byte("new"), 0o600))
	set("new", "user.new", "\x00\xff")
	set("new", "security.capability", capability)
	set("d/one", "user.empty", "")
	set("d/one", "security.capability", capability)
	// The kernel lets nobody set an ACL on what is in EROFS only, so there is another change first.
	run(t, "cd "+w.mnt+"; chmod 640 d/large; chmod 755 d")
	set("d/large", "system.posix_acl_access", acl)
	set("d", "system.posix_acl_default", acl)
	set("d", "user.dir", string(make([]byte, 2000)))
	must(t, unix.Lremovexattr(filepath.Join(w.mnt, "d/xattrs"), "user.a"))
	set(".", "user.root", "r")
	w.commit(t, nil)

	w.mount(t, true)
	set("top", "user.keep", "k")
	set("top", "trusted.keep", "t")
	set("top", "trusted.overlay.redirect", "/etc")
	set("e", "trusted.overlay.opaque", "y")
	set("e", "user.overlay.opaque", "y")
	l, err := w.scan(false).TOC(t.Context())
	must(t, err)
	got := map[string][]toc.Xattr{}
	for _, e := range l.Entries {
		got[e.Name] = e.Xattrs
	}
	if x := got["top"]; len(x) != 2 || x[0] != (toc.Xattr{Name: "trusted.keep", Value: "t"}) || x[1] != (toc.Xattr{Name: "user.keep", Value: "k"}) {
		t.Errorf("top has %q", x)
	}
	if x, ok := got["e"]; !ok || len(x) != 0 {
		t.Errorf("e has %q", x)
	}
	if _, opaque := got["e/.wh..wh..opq"]; opaque {
		t.Error("a container made a directory opaque with an xattr")
	}
	mustLog(t, w, "level=WARN", "xattrs of overlayfs", "count=3", "of \\\"e\\\"")
	w.unmount()
}

// TestRandom does many things in a mount, commits, and goes on above that, several times. The seed is fixed.
func TestRandom(t *testing.T) {
	w := newWorld(t)
	w.add(t, base())
	r := rand.New(rand.NewPCG(1, 2))
	for generation := range 5 {
		w.mount(t, true)
		done := 0
		for range 250 {
			if mutate(r, w.mnt) == nil {
				done++
			}
		}
		if done < 100 {
			t.Errorf("only %d of 250 things could be done", done)
		}
		l := w.commit(t, func(d integration.Difference) bool { return d.Field == "nlink" || d.Field == "first" })
		t.Logf("generation %d: %d things done, %d entries", generation, done, len(l.Entries))
		if t.Failed() {
			t.Log(w.log.String())
			return
		}
	}
}

// mutate does one thing somewhere below root. Much cannot be done, which is an error.
func mutate(r *rand.Rand, root string) error {
	var files, dirs []string
	filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			dirs = append(dirs, path)
		} else if d.Type().IsRegular() {
			files = append(files, path)
		}
		return nil
	})
	pick := func(list []string) string {
		if len(list) == 0 {
			return filepath.Join(root, "none")
		}
		return list[r.IntN(len(list))]
	}
	// What is deleted is deep, so that much is left.
	deep := func() string {
		d := ""
		for range 4 {
			if p := pick(dirs); p != root && strings.Count(p, "/") > strings.Count(d, "/") {
				d = p
			}
		}
		return d
	}
	fresh := func() string { return filepath.Join(pick(dirs), string(rune('a'+r.IntN(8)))) }
	sizes := []int{0, 1, 100, chunk - 1, chunk, chunk + 1, 2 * chunk}
	content := func() []byte { return []byte(text(string(rune('A'+r.IntN(26))), sizes[r.IntN(len(sizes))])) }
	switch r.IntN(24) {
	case 0, 1, 20, 21:
		return os.WriteFile(fresh(), content(), 0o666)
	case 2:
		return os.WriteFile(pick(files), content(), 0)
	case 3:
		f, err := os.OpenFile(pick(files), os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.WriteAt([]byte("in the middle"), int64(r.IntN(3*chunk)))
		return err
	case 4:
		return os.Truncate(pick(files), int64(r.IntN(4*chunk)))
	case 5:
		return os.Remove(pick(files))
	case 6:
		if r.IntN(4) > 0 {
			return os.Remove(pick(dirs))
		}
		return os.RemoveAll(deep())
	case 7, 8, 22, 23:
		return os.Mkdir(fresh(), 0o777)
	case 9, 10, 11:
		d := pick(dirs)
		if d == root {
			return os.ErrInvalid
		}
		return os.Rename(d, fresh())
	case 12, 13:
		return os.Rename(pick(files), fresh())
	case 14:
		return os.Chmod(pick(append(files, dirs...)), os.FileMode(r.IntN(0o1000))|0o400)
	case 15:
		return os.Lchown(pick(append(files, dirs...)), r.IntN(1<<20), r.IntN(1<<20))
	case 16:
		return os.Link(pick(files), fresh())
	case 17:
		return os.Symlink("target", fresh())
	case 18:
		return unix.Setxattr(pick(append(files, dirs...)), "user.x", []byte{byte(r.Int())}, 0)
	default: // what was there comes again as something else
		d := deep()
		os.RemoveAll(d)
		if r.IntN(2) == 0 {
			return os.Mkdir(d, 0o700)
		}
		return os.WriteFile(d, content(), 0o600)
	}
}
