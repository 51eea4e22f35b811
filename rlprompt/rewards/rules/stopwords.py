"""The commonest function words of seven languages: what carries a language, but no topic."""

from __future__ import annotations

_LISTS: dict[str, str] = {
    "en": """a about after all also am an and any are as at be because been before being between
        both but by can could did do does doing don't down during each for from had has have having
        he her here him his how i i'm if in into is it it's its just me more most my no nor not of
        off on once only or other our out over own same she should so some such than that that's the
        their them then there these they this those through to too under until up very was we were
        what when where which while who why will with would you your""",
    "de": """aber als also am an auch auf aus bei bin bis bist da damit dann das dass dein dem den
        der des die dies diese dieser doch dort durch ein eine einem einen einer eines er es euch
        für haben hat hatte ich ihm ihn ihr im in ist ja kann kein keine man mein mich mir mit nach
        nicht noch nur ob oder ohne schon sehr sein sich sie sind so über um und uns unter vom von
        vor war was weil wenn wer werden wie wir wird wo zu zum zur""",
    "fr": """à afin ainsi alors après au aussi autre aux avec avoir c'est ce ces cet cette comme
        dans de des donc du elle elles en encore entre est et être eux fait il ils j'ai je la le les
        leur leurs lui l'on ma mais même mes moi mon ne nos notre nous on ont ou où par pas peu
        peut plus pour qu'il que qui sa sans se ses si son sont sous sur ta te tes toi ton tous tout
        très tu un une vos votre vous y""",
    "es": """a al algo antes aunque como con contra cual cuando de del desde donde durante e el
        ella ellas ellos en entre era es esa ese eso esta está este esto están fue ha hasta hay la
        las le les lo los más me mi mientras muy nada ni no nos nosotros o os otra otro para pero
        por porque puede que qué quien se ser si sí sin sobre son su sus también tan te tiene todo
        todos tu un una uno unos y ya yo""",
    "it": """a ad ai al alla alle allo anche che chi ci ciò come con cosa cui da dai dal dalla
        degli dei del della delle dello di dove e è ed era essere fra già gli ha hanno ho i il in
        io la le lei li lo loro lui ma mi mia mio molto ne nei nel nella no noi non nostro o ogni
        per perché però più può qua quale quando quello questa questo se senza si sia sono su sua
        sul sulla suo te tra tu tutti un una uno vi voi""",
    "pt": """a à ainda ao aos as às até com como da das de dela dele depois do dos e é ela elas
        ele eles em entre era essa esse esta está este eu foi há isso já lhe mais mas me mesmo meu
        minha muito na não nas nem no nos nós num numa o os ou para pela pelo pode por porque qual
        quando que quem são se sem ser seu seus só sobre sua suas também te tem ter tudo um uma
        você vocês""",
    "nl": """aan als bij dan dat de deze die dit doen door een en er ge geen had hebben heeft hem
        het hier hij hoe hun ik in is ja je jij jouw kan kunnen maar me meer men met mij mijn moet
        na naar niet niets nog nu of om omdat onder ons ook op over te tegen toch toen tot u uit uw
        van
        veel voor want waren was wat we wel werd wie wij worden wordt ze zich zij zijn zo zonder
        zou""",
}

STOP_WORDS: dict[str, frozenset[str]] = {
    language: frozenset(words.split()) for language, words in _LISTS.items()
}
"""ISO 639-1 code -> lower-cased words."""
