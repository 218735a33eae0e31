package rootfs

import (
	"crypto/sha256"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"lazuli/fs/fetch"
	"lazuli/fs/pack"
	"lazuli/fs/profile"
	"lazuli/fs/remote"
	"lazuli/fs/store"
	"lazuli/fs/toc"
)

// paths are the files of a profile, each once, with the largest share of a piece.
func paths(p *profile.Profile) map[string]float64 {
	m := map[string]float64{}
	for _, x := range p.Pieces {
		m[x.Path] = max(m[x.Path], x.Share)
	}
	return m
}

// TestLearn: what a start of a chain has read becomes a profile; what it can have read unseen does not count less, and what nobody can have
// read does. What a pack has belongs to it.
func TestLearn(t *testing.T) {
	n, err := Open(t.TempDir(), Options{})
	must(t, err)
	defer n.Close()
	c := Chain{n, kept(t, n, 1, 2, 3, 4).Layers}
	all := &profile.Profile{}
	for _, name := range []string{"1", "2", "3", "4"} {
		all.Pieces = append(all.Pieces, profile.Piece{Path: name})
	}
	files, err := c.files(nil, nil, all)
	must(t, err)
	if len(files.objects) != 4 {
		t.Fatalf("%d files", len(files.objects))
	}
	touch := func(name string, off, size int64) fetch.Touch {
		return fetch.Touch{Key: store.Key(files.objects[name].key), Off: off, N: size, After: time.Millisecond}
	}
	ref, err := remote.ParseReference("registry.example.com/app:1")
	must(t, err)
	command := []string{"/bin/app", "--serve"}
	digest := v1.Hash{Algorithm: "sha256", Hex: strings.Repeat("1", 64)}
	note := func(touches ...fetch.Touch) Lesson {
		t.Helper()
		l, err := c.note(ref, digest, command, touches)
		must(t, err)
		return l
	}
	l := note(touch("1", 0, 10), touch("2", 70000, 2), touch("3", 0, boundFile))
	if want := 1 + 1 + boundFile/profile.PieceSize; len(l.Learned.Profile.Pieces) != want {
		t.Errorf("%d pieces, want %d", len(l.Learned.Profile.Pieces), want)
	}
	if _, err := c.note(ref, digest, command, []fetch.Touch{{Key: store.Key{9}, N: 1}}); err == nil {
		t.Error("a start that has read nothing of the image was learned")
	}

	// 3 is not here at the end, so this one has not read it.
	must(t, os.Remove(filepath.Join(n.store.Objects(), store.Key(files.objects["3"].key).Path())))
	l = note(touch("1", 0, 10))
	if got := paths(l.Learned.Profile); got["1"] != 1 || got["2"] != 1 || got["3"] >= 0.7 || l.Learned.Starts != 2 {
		t.Errorf("after a second start: %v, %d starts", got, l.Learned.Starts)
	}

	// A pack of all of 4 and a chunk of 1.
	chunks := []pack.Chunk{{Object: packNumber(files.objects["1"].key)}}
	for i := range files.objects["4"].chunks {
		chunks = append(chunks, pack.Chunk{Object: packNumber(files.objects["4"].key), Index: i})
	}
	n.knowPack(c.ID(), digest, chunks)
	l = note(touch("1", 0, 10), touch("2", 0, 10))
	if got := paths(l.Learned.Profile); got["4"] != 1 || got["2"] == 0 || l.Packed != len(chunks) || l.Missed != 1 || l.Pack != digest {
		t.Errorf("after a start with a pack: %v, %+v", got, l)
	}

	list, err := Profiles(n.Root(), ref)
	must(t, err)
	if len(list) != 1 || !slices.Equal(list[0].Command, command) || list[0].Starts != 3 || list[0].Repository != "registry.example.com/app" ||
		len(list[0].Profile.Pieces) != len(l.Learned.Profile.Pieces) {
		t.Errorf("read back: %+v", list)
	}
	if got := n.learned("registry.example.com/app", command); got == nil || got.Starts != 3 {
		t.Errorf("learned: %+v", got)
	}
	if got := n.learned("registry.example.com/app", nil); got != nil {
		t.Errorf("learned of another command: %+v", got)
	}
	for _, name := range []string{"", "lock", filepath.Base(profilePath(n.profiles(), "registry.example.com/app", command))} {
		fi, err := os.Stat(filepath.Join(n.profiles(), name))
		must(t, err)
		if fi.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: mode %v, which is not for root only", name, fi.Mode())
		}
	}
	// One that was damaged is made again.
	must(t, os.WriteFile(profilePath(n.profiles(), "registry.example.com/app", command), []byte("# {}\n{"), 0o600))
	if got := n.learned("registry.example.com/app", command); got != nil {
		t.Errorf("of a damaged file: %+v", got)
	}
	if l = note(touch("1", 0, 10)); l.Learned.Starts != 1 {
		t.Errorf("%d starts", l.Learned.Starts)
	}
}

// TestBoundProfiles: the longest unused go, and what was not finished.
func TestBoundProfiles(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "profiles")
	for i := range 6 {
		l := Learned{Repository: fmt.Sprint(i), Profile: &profile.Profile{Pieces: []profile.Piece{{Path: strings.Repeat("x", 900), Share: 1}}}}
		path := profilePath(dir, l.Repository, nil)
		must(t, l.write(path))
		at := time.Unix(int64(1000+i), 0)
		must(t, os.Chtimes(path, at, at))
	}
	must(t, os.WriteFile(filepath.Join(dir, "new-1"), nil, 0o600))
	left := func() (list []string) {
		entries, err := os.ReadDir(dir)
		must(t, err)
		for i := range 6 {
			if slices.ContainsFunc(entries, func(e os.DirEntry) bool {
				return e.Name() == filepath.Base(profilePath(dir, fmt.Sprint(i), nil))
			}) {
				list = append(list, fmt.Sprint(i))
			}
		}
		if len(list) != len(entries) {
			t.Errorf("%v", entries)
		}
		return list
	}
	must(t, boundProfiles(dir, 4, 1<<20))
	if got := left(); !slices.Equal(got, []string{"2", "3", "4", "5"}) {
		t.Errorf("left: %v", got)
	}
	must(t, boundProfiles(dir, 4, 2500))
	if got := left(); !slices.Equal(got, []string{"4", "5"}) {
		t.Errorf("left: %v", got)
	}
}

// TestChanged: what lies at a pack's paths is wanted if it has another content than the pack brings, the highest layer's.
func TestChanged(t *testing.T) {
	digest := func(s string) toc.Digest { return sha256.Sum256([]byte(s)) }
	layer := func(files map[string][]string) *toc.TOC {
		l := new(toc.TOC)
		for _, name := range slices.Sorted(maps.Keys(files)) {
			e := toc.Entry{Name: name, Type: toc.Regular, FirstChunk: uint32(len(l.Chunks)), NumChunks: uint32(len(files[name]))}
			for _, content := range files[name] {
				l.Chunks = append(l.Chunks, toc.Chunk{Digest: digest(content), Size: 10})
				e.Size += 10
			}
			l.Entries = append(l.Entries, e)
		}
		return l
	}
	key := func(l *toc.TOC, name string) toc.Digest {
		i := slices.IndexFunc(l.Entries, func(e toc.Entry) bool { return e.Name == name })
		return toc.ObjectKey(l.Content(&l.Entries[i]))
	}
	old := layer(map[string][]string{"same": {"a"}, "other": {"b", "c"}, "shorter": {"d", "e"}, "hidden": {"f"}, "gone": {"g"}, "unnamed": {"h"}})
	low := layer(map[string][]string{"same": {"a"}, "other": {"x", "c"}, "shorter": {"y"}, "hidden": {"f"}, "unnamed": {"z"}})
	high := layer(map[string][]string{"hidden": {"w"}})
	x := &pack.Index{Paths: map[uint64]string{}}
	for _, c := range []struct {
		name  string
		chunk int
	}{{"shorter", 1}, {"hidden", 0}, {"same", 0}, {"other", 0}, {"gone", 0}, {"unnamed", 0}, {"other", 1}} {
		n := packNumber(key(old, c.name))
		x.Frames = append(x.Frames, pack.Frame{Chunks: []pack.Chunk{{Object: n, Index: c.chunk}}})
		if x.Paths[n] = c.name; c.name == "unnamed" {
			x.Paths[n] = ""
		}
	}
	want := []fetch.Want{{Key: store.Key(key(high, "hidden"))}, {Key: store.Key(key(low, "other"))}, {Key: store.Key(key(low, "other")), Chunk: 1}}
	if diff := cmp.Diff(want, changed(x, []*toc.TOC{low, high})); diff != "" {
		t.Error(diff)
	}
}
